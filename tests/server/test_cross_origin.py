"""Pages of other origins: none may read an answer unless the configuration names it, errors and preflights included."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from traitlets.config import Config

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.server.api.cross_origin import check_origins
from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]
FRIEND, EVIL = "https://friend.example", "https://evil.example"
PATHS = [
    "llmcloud/v1/models",
    "llmcloud/v1/nothing",
    "llmcloud/v1/completions",
    "llmcloud/api/status",
    "llmcloud/livez",
]
ALLOW = "Access-Control-Allow-Origin"


async def preflight(server: Server, path: str, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }
    return await server.client.options(f"{server.url}/{path}", headers=headers)


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_names_an_origin_by_default(server: Server, path: str) -> None:
    for origin in (EVIL, "null", server.url):
        assert ALLOW not in (await preflight(server, path, origin)).headers
        for key in (None, await server.key(), "sk-llmc-wrong"):
            answer = await server.ask("GET", path, key=key, headers={"Origin": origin})
            assert ALLOW not in answer.headers


class TestNamed:
    """With one origin that is named."""

    @pytest.fixture
    def jp_server_config(self, jp_server_config: Config) -> Config:
        jp_server_config.LLMCloudExtension.allow_origins = [FRIEND]
        return jp_server_config

    @pytest.mark.parametrize("path", PATHS)
    async def test_a_preflight_allows_what_clients_send(self, server: Server, path: str) -> None:
        answer = await preflight(server, path, FRIEND)
        assert answer.status_code == 204 and answer.content == b""
        assert answer.headers[ALLOW] == FRIEND and "Origin" in answer.headers["Vary"]
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
        assert answer.headers["Access-Control-Allow-Headers"] == "Authorization, *"
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert ALLOW not in (await preflight(server, path, EVIL)).headers

    @pytest.mark.parametrize("path", PATHS)
    async def test_errors_can_be_read_too_by_the_named_one_alone(self, server: Server, path: str) -> None:
        for key in (None, await server.key(), "sk-llmc-wrong"):
            for method in ("GET", "POST"):
                for origin, named in ((FRIEND, FRIEND), (EVIL, None), (f"{FRIEND}.evil.example", None), ("null", None)):
                    answer = await server.ask(method, path, key=key, headers={"Origin": origin})
                    assert answer.headers.get(ALLOW) == named, f"{method} {path} {answer.status_code}"

    async def test_a_page_asks_the_model_and_reads_the_stream_and_the_headers_of_its_quota(
        self, server: Server, model: Path
    ) -> None:
        await server.serve(model)
        key = await server.key(requests_per_minute=1)
        body = {"model": "tiny", "prompt": "count 2", "stream": True}
        for status in (200, 429):
            answer = await server.ask("POST", "llmcloud/v1/completions", body, key, headers={"Origin": FRIEND})
            assert answer.status_code == status and answer.headers[ALLOW] == FRIEND
            assert "x-ratelimit-remaining-requests" in answer.headers
            assert "x-ratelimit-remaining-requests" in answer.headers["Access-Control-Expose-Headers"]


class TestAllOfJupyter:
    """With Jupyter's own setting that allows any origin: it does not open our routes to all pages."""

    @pytest.fixture
    def jp_server_config(self, jp_server_config: Config) -> Config:
        jp_server_config.ServerApp.allow_origin = "*"
        return jp_server_config

    @pytest.mark.parametrize("path", PATHS)
    async def test_no_origin_is_named(self, server: Server, path: str) -> None:
        assert ALLOW not in (await preflight(server, path, EVIL)).headers
        assert ALLOW not in (await server.ask("GET", path, key=await server.key(), headers={"Origin": EVIL})).headers


class TestAny:
    """With a star in our own setting."""

    @pytest.fixture
    def jp_server_config(self, jp_server_config: Config) -> Config:
        jp_server_config.LLMCloudExtension.allow_origins = ["*"]
        return jp_server_config

    async def test_any_page_may_ask_without_cookies_and_no_origin_is_reflected(self, server: Server) -> None:
        for answer in (
            await preflight(server, "llmcloud/v1/models", EVIL),
            await server.ask("GET", "llmcloud/v1/models", key=await server.key(), headers={"Origin": EVIL}),
        ):
            assert answer.headers[ALLOW] == "*" and "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["example.org", "https://a/b", "https://*.example.org", "https://", ""])
def test_a_text_that_is_no_origin_is_refused_when_the_server_starts(origin: str) -> None:
    with pytest.raises(UsageError, match="is no origin"):
        check_origins([origin])


def test_origins_are_compared_as_browsers_send_them() -> None:
    assert check_origins(["HTTPS://Example.org:8443", "*"]) == {"https://example.org:8443", "*"}
