"""Who may do what: every route has a rule, and a scoped key opens nothing but the models in its scope."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest
from jupyter_server.auth import Authorizer
from jupyter_server.utils import JupyterServerAuthWarning
from tornado.httpclient import HTTPClientError
from tornado.web import RequestHandler
from traitlets.config import Config

from jupyter_llmcloud.server.api.base import RESOURCE
from jupyter_llmcloud.server.gateway.handlers import UnknownPathHandler
from jupyter_llmcloud.server.gateway.open_requests import INFERENCE_ROUTES
from jupyter_llmcloud.server.routes import ROUTES
from tests.support.plain_http import PLAIN
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]

PUBLIC = {"/llmcloud/livez", "/llmcloud/readyz", "/llmcloud/health"}
METHODS = ("get", "head", "post", "put", "patch", "delete")


def routes() -> list[tuple[str, str, Any]]:
    """(method, path, function) of every method that a route of ours implements."""
    found = []
    for pattern, handler, *_ in ROUTES:
        path = pattern.replace("(.+)", "name").replace("(?:/.*)?", "/nothing")
        for route in INFERENCE_ROUTES:
            path = path.replace(f"({route})", route)
        path = path.replace("\\.", ".").replace("(infer)", "infer").replace("(infer_stream)", "infer_stream")
        path = re.sub(r"\(\[A-Za-z0-9\].*?\)", "name", path)
        for method in METHODS:
            function = getattr(handler, method)
            if function is not RequestHandler._unimplemented_method:
                found.append((method.upper(), path, function))
    return found


def test_every_method_of_every_route_has_an_access_rule() -> None:
    assert len(routes()) > 20
    for method, path, function in routes():
        if path in PUBLIC:
            continue
        rule = getattr(function, "llmcloud_access", None)
        assert rule is not None, f"{method} {path} has no access rule"
        assert rule[0] in ("read", "write", "execute") and rule[1] == RESOURCE


def test_reading_never_changes_anything() -> None:
    for method, path, function in routes():
        if path not in PUBLIC and method != "GET":
            assert function.llmcloud_access[0] in ("write", "execute"), f"{method} {path}"
        elif path not in PUBLIC:
            assert function.llmcloud_access[0] == "read", f"{method} {path}"


def test_the_server_finds_no_route_of_ours_without_authentication(jp_configurable_serverapp: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", JupyterServerAuthWarning)
        app = jp_configurable_serverapp()
    assert app.web_app.settings["allow_unauthenticated_access"] is False


@pytest.mark.parametrize("jp_server_config", [Config({"ServerApp": {"jpserver_extensions": {}}})])
async def test_a_server_without_the_extension_answers_as_the_front_end_expects_it(jp_fetch: Any) -> None:
    with pytest.raises(HTTPClientError) as refused:
        await jp_fetch("llmcloud", "api", "status")
    assert refused.value.code == 404
    assert refused.value.response.body.startswith(b"<!DOCTYPE")  # not JSON, as all of our refusals are


async def test_nobody_gets_anything_without_a_token(server: Server) -> None:
    wrong = {}
    for method, path, _ in routes():
        expected = 200 if path in PUBLIC else 401 if "/v1" in path or "/v2" in path else 403
        for headers in ({}, {"Authorization": "token wrong"}, {"Authorization": "Bearer sk-llmc-wrong"}):
            answer = await server.client.request(method, f"{server.url}{path}", headers=headers)
            if answer.status_code != expected:
                wrong[f"{method} {path} {headers}"] = answer.status_code
    assert wrong == {}


async def test_a_scoped_key_opens_no_route_of_the_api(server: Server) -> None:
    key = await server.key("infer:*", "models:read")
    wrong = {}
    for method, path, _ in routes():
        if "/api/" in path and (answer := await server.ask(method, path.lstrip("/"), key=key)).status_code != 403:
            wrong[f"{method} {path}"] = answer.status_code
    assert wrong == {}


@pytest.mark.parametrize("path", ["api/kernels", "api/contents", "api/terminals", "api/me", "metrics", "tree"])
async def test_a_scoped_key_opens_no_route_of_jupyter(server: Server, path: str) -> None:
    answer = await server.ask("GET", path, key=await server.key("infer:*", "models:read"))
    assert answer.status_code in (302, 401, 403, 404), path
    assert not answer.is_success


async def test_a_scoped_key_sets_no_cookie_and_is_never_logged(
    server: Server, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await server.serve(model)
    key = await server.key()
    with caplog.at_level(logging.DEBUG):
        for path in ("llmcloud/v1/models", "llmcloud/v1/nothing", "llmcloud/api/status"):
            assert "Set-Cookie" not in (await server.ask("GET", path, key=key)).headers
        await server.complete("hello", key)
        await server.complete("hello", key, model="other")
        await server.ask("DELETE", f"llmcloud/api/keys/{key.split('-')[2]}")
    secret = key.split("-")[3]
    assert secret not in caplog.text
    assert all(secret not in str(row) for row in server.context.state.audit())
    await server.context.requests.write()
    assert secret.encode() not in b"".join(
        file.read_bytes() for file in server.context.state.path.parent.glob("*sqlite*")
    )


async def test_a_key_in_the_query_is_not_taken(server: Server) -> None:
    answer = await server.client.get(f"{server.url}/llmcloud/v1/models?token={await server.key()}")
    assert answer.status_code == 401


async def test_a_change_by_cookie_needs_the_xsrf_token(server: Server) -> None:
    url = f"{server.url}/llmcloud/api/keys"
    body = {"scopes": ["models:read"]}
    async with httpx.AsyncClient(trust_env=False, verify=PLAIN) as browser:
        await browser.get(f"{server.url}/llmcloud/api/status?token={server.token}")  # signs in: sets the cookie
        assert (await browser.get(url)).status_code == 200
        assert (await browser.post(url, json=body)).status_code == 403
        await browser.get(f"{server.url}/nothing")  # a page sets the other cookie
        headers = {"X-XSRFToken": browser.cookies["_xsrf"]}
        assert (await browser.post(url, json=body, headers=headers)).status_code == 201


class ReadOnly(Authorizer):
    """Reading only."""

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return action == "read" or resource != RESOURCE


class TestReadOnly:
    """With an authorizer that allows reading llmcloud and nothing else."""

    @pytest.fixture
    def jp_server_config(self, jp_server_config: Config) -> Config:
        jp_server_config.ServerApp.authorizer_class = ReadOnly
        return jp_server_config

    async def test_no_change_is_allowed(self, server: Server) -> None:
        wrong = {}
        for method, path, _ in routes():
            if method != "GET" and path not in PUBLIC:
                answer = await server.ask(method, path.lstrip("/"), {})
                if answer.status_code != 403:
                    wrong[f"{method} {path}"] = answer.status_code
        assert wrong == {}

    async def test_reading_is_allowed(self, server: Server) -> None:
        for path in ("api/status", "api/clusters", "api/runs", "api/endpoints", "api/keys", "v1/models"):
            assert (await server.ask("GET", f"llmcloud/{path}")).status_code == 200, path

    async def test_a_refusal_of_the_gateway_speaks_openais_words(self, server: Server) -> None:
        answer = await server.complete("hello")
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"


def test_unknown_paths_are_answered_after_all_others() -> None:
    assert ROUTES[-1][1] is UnknownPathHandler
