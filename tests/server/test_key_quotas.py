"""Keys at work: their quotas in front of a model, rotation, usage, alerts, and whose they are."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from jupyter_server.auth.identity import IdentityProvider, User
from prometheus_client import REGISTRY
from traitlets.config import Config

from jupyter_llmcloud.core.serving.usage import anomalies
from jupyter_llmcloud.storage.server_state import RequestRecord
from tests.server.test_gateway import error_of, stream
from tests.support.plain_http import PLAIN
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]


def id_of(key: str) -> str:
    return key.split("-")[2]


async def test_requests_over_the_limit_are_429_and_say_when_to_come_again(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key(requests_per_minute=2)
    first, second = await server.complete("hello", key), await server.complete("hello", key)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    refused = await server.complete("hello", key)
    error = error_of(refused, 429)
    assert error["code"] == "rate_limit_exceeded" and "2 requests per minute" in error["message"]
    assert 1 <= int(refused.headers["Retry-After"]) <= 61
    assert 1 <= int(refused.headers["retry-after-ms"]) <= 61_000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await server.complete("hello", await server.key())).status_code == 200  # another key is not concerned


async def test_a_key_without_limits_gets_no_rate_headers(server: Server, model: Path) -> None:
    await server.serve(model)
    answer = await server.complete("hello", await server.key())
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_tokens_are_reserved_when_a_request_comes_and_settled_when_it_ends(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key(tokens_per_minute=1000)
    answer = await server.complete("hello", key, max_tokens=500)
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 500
    settled = await server.complete("hello", key, max_tokens=10)
    # The first one has cost 3 + 5 tokens; of the second one, the estimate is still reserved.
    assert int(settled.headers["x-ratelimit-remaining-tokens"]) > 900
    assert error_of(await server.complete("hello", key, max_tokens=999), 429)["code"] == "rate_limit_exceeded"


async def test_what_the_replica_refuses_costs_no_tokens(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key(tokens_per_minute=1000)
    assert (await server.complete("busy", key, max_tokens=900)).status_code == 503
    assert (await server.complete("hello", key, max_tokens=900)).status_code == 200


async def test_requests_at_once_are_limited_and_free_again_when_a_stream_ends_or_its_client_hangs_up(
    server: Server, model: Path
) -> None:
    await server.serve(model)
    key = await server.key(parallel_requests=1)
    async with (
        httpx.AsyncClient(trust_env=False, verify=PLAIN) as client,
        stream(server, "endless", key, client) as answer,
    ):
        await anext(answer.aiter_raw())
        assert "1 requests at once" in error_of(await server.complete("hello", key), 429)["message"]
    await until(lambda: _answered(server, key), "the place is free again")


async def _answered(server: Server, key: str) -> bool:
    return (await server.complete("hello", key)).status_code == 200


async def test_a_stream_is_settled_by_what_its_replica_counted(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key(tokens_per_minute=1000)
    async with stream(server, "count 3", key) as answer:
        await answer.aread()
    await server.context.requests.write()
    stored = server.context.state.key(id_of(key))
    assert server.context.quotas.headers(stored)["x-ratelimit-remaining-tokens"] == "992"  # 3 + 5


async def test_a_restarted_server_knows_what_was_asked_in_the_last_minute(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key(requests_per_minute=3)
    now = time.time()
    rows = [
        RequestRecord(str(n), f"key:{id_of(key)}", "tiny", "completions", status, 0.1, t=now - age)
        for n, (status, age) in enumerate([(200, 90.0), (200, 30.0), (400, 20.0), (429, 10.0)])
    ]
    server.context.state.add_usage(rows)
    assert (await server.complete("hello", key)).status_code == 200
    error_of(await server.complete("hello", key), 429)


@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True, 1e18])
@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute", "parallel_requests"])
async def test_a_limit_that_is_no_count_is_refused_by_name(server: Server, name: str, value: Any) -> None:
    answer = await server.ask("POST", "llmcloud/api/keys", {"scopes": ["models:read"], name: value})
    assert answer.status_code == 400 and name in answer.json()["message"]


async def test_the_openai_client_waits_as_long_as_it_is_told(server: Server, model: Path) -> None:
    openai = pytest.importorskip("openai")
    await server.serve(model)
    client = openai.AsyncOpenAI(
        base_url=f"{server.url}/llmcloud/v1", api_key=await server.key(parallel_requests=1), max_retries=8
    )
    answers = await asyncio.gather(*(client.completions.create(model="tiny", prompt="hello") for _ in range(3)))
    assert [answer.choices[0].text for answer in answers] == ["hello!"] * 3
    await client.close()


# --- rotation ---


async def test_a_rotated_key_is_valid_beside_the_new_one_for_the_overlap(server: Server, model: Path) -> None:
    await server.serve(model)
    old = await server.key(label="mine", requests_per_minute=5, expires_s=7200)
    answer = await server.ask("POST", f"llmcloud/api/keys/{id_of(old)}/rotate", {"overlap_s": 1.0})
    assert answer.status_code == 201 and answer.headers["Cache-Control"] == "no-store"
    new = answer.json()
    assert (new["label"], new["requests_per_minute"], new["scopes"]) == ("mine", 5, ["infer:tiny", "models:read"])
    assert new["expires"] - new["created"] == pytest.approx(7200)
    for key in (old, new["key"]):
        assert (await server.complete("hello", key)).status_code == 200
    await until(lambda: _refused(server, old), "the old key ends")
    assert (await server.complete("hello", new["key"])).status_code == 200
    rows = {row["id"]: row for row in (await server.ask("GET", "llmcloud/api/keys")).json()["keys"]}
    assert rows[id_of(old)]["replaced_by"] == new["id"] and rows[id_of(old)]["state"] == "expired"
    assert server.context.state.audit(action="key.rotate")[0]["subject"] == id_of(old)


async def _refused(server: Server, key: str) -> bool:
    return (await server.complete("hello", key)).status_code == 401


async def test_a_rotation_never_makes_a_key_last_longer(server: Server) -> None:
    old = await server.key(expires_s=10)
    await server.ask("POST", f"llmcloud/api/keys/{id_of(old)}/rotate", {"overlap_s": 5000})
    stored = server.context.state.key(id_of(old))
    assert stored.expires - stored.created == pytest.approx(10)


async def test_a_key_that_has_ended_or_never_was_cannot_be_rotated(server: Server) -> None:
    key = await server.key()
    await server.ask("DELETE", f"llmcloud/api/keys/{id_of(key)}")
    for key_id in (id_of(key), "nothing"):
        answer = await server.ask("POST", f"llmcloud/api/keys/{key_id}/rotate", {})
        assert answer.status_code == 404, answer.text


# --- usage ---


async def test_usage_is_told_by_key_and_day_and_follows_what_is_asked(server: Server, model: Path) -> None:
    await server.serve(model)
    key, other = await server.key(label="=cmd()"), await server.key("infer:nothing")
    for _ in range(3):
        await server.complete("hello", key)
    await server.complete("hello", other)
    await server.context.requests.write()
    rows = {row["id"]: row for row in (await server.ask("GET", "llmcloud/api/keys/usage?days=2")).json()["usage"]}
    used = rows[id_of(key)]
    assert (used["requests"], used["refused"], used["prompt_tokens"], used["generated_tokens"]) == (3, 0, 9, 15)
    assert (rows[id_of(other)]["requests"], rows[id_of(other)]["refused"]) == (1, 1)
    listed = {row["id"]: row for row in (await server.ask("GET", "llmcloud/api/keys")).json()["keys"]}
    assert listed[id_of(key)]["last_used"] == used["last_used"]


async def test_a_request_costs_no_write_of_its_own(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    writes = []
    add = server.context.state.add_usage
    server.context.state.add_usage = lambda rows: (writes.append(len(rows)), add(rows))
    try:
        for _ in range(20):
            await server.complete("hello", key)
        await server.context.requests.write()
    finally:
        server.context.state.add_usage = add
    assert sum(writes) == 20 and len(writes) <= 10


async def test_the_terminal_tells_usage_as_a_table_and_as_csv_without_formulas(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from jupyter_llmcloud.server.cli import main

    monkeypatch.setenv("LLMCLOUD_SERVER_URL", server.url)
    monkeypatch.setenv("LLMCLOUD_SERVER_TOKEN", server.token)
    await server.serve(model)
    created = ("keys", "create", "--scope", "infer:tiny", "--label", "=2+3", "--requests-per-minute", "9")
    assert await asyncio.to_thread(main, created) == 0
    key = capsys.readouterr().out.strip()
    await server.complete("hello", key)
    await server.context.requests.write()
    assert await asyncio.to_thread(main, ("keys", "usage", "--csv")) == 0
    [row] = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["id"], row["label"], row["requests"], row["generated_tokens"]) == (id_of(key), "'=2+3", "1", "5")
    assert await asyncio.to_thread(main, ("keys", "usage")) == 0
    assert id_of(key) in capsys.readouterr().out
    assert await asyncio.to_thread(main, ("keys", "rotate", id_of(key), "--overlap", "1h")) == 0
    assert capsys.readouterr().out.startswith("sk-llmc-")
    assert await asyncio.to_thread(main, ("keys", "alerts")) == 0


# --- alerts ---


async def test_a_key_that_only_gets_refusals_leaves_an_alert(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    before = REGISTRY.get_sample_value("llmcloud_key_alerts_total", {"rule": "only refused"}) or 0
    for _ in range(anomalies.NUM_REFUSED + 5):
        await server.complete("hello", key, model="other")
    [alert] = (await server.ask("GET", "llmcloud/api/keys/alerts")).json()["alerts"]
    assert (alert["id"], alert["rule"]) == (id_of(key), "only refused")
    assert REGISTRY.get_sample_value("llmcloud_key_alerts_total", {"rule": "only refused"}) == before + 1


async def test_a_revoked_key_that_is_tried_on_and_on_leaves_an_alert(server: Server) -> None:
    key = await server.key()
    await server.ask("DELETE", f"llmcloud/api/keys/{id_of(key)}")
    for _ in range(anomalies.NUM_REFUSED):
        await server.ask("GET", "llmcloud/v1/models", key=key)
    assert server.context.state.audit(action="key.alert")[0]["detail"]["rule"] == "only refused"


async def test_a_key_that_asks_from_elsewhere_leaves_an_alert(server: Server, jp_serverapp: Any) -> None:
    alerts = server.context.alerts
    key = id_of(await server.key())
    for _ in range(anomalies.MIN_REQUESTS):
        alerts.asked(key, "192.0.2.1")
    alerts.asked(key, "203.0.113.5")
    [alert] = (await server.ask("GET", "llmcloud/api/keys/alerts")).json()["alerts"]
    assert alert["rule"] == "new address" and "203.0.113.0/24" in alert["what"]


# --- whose keys they are ---


@dataclass
class HubUser(User):
    """As JupyterHub's identity provider makes them."""

    hub_user: dict[str, Any] = field(default_factory=dict)


class Hub(IdentityProvider):
    """Who comes is in a header, as in a test only."""

    def get_user(self, handler: Any) -> User | None:
        name = handler.request.headers.get("X-Test-User")
        handler._token_authenticated = True
        return HubUser(username=name, hub_user={"name": name, "admin": name == "root"}) if name else None


class TestBehindJupyterHub:
    """A server of ada, which is shared with bob."""

    @pytest.fixture
    def jp_server_config(self, jp_server_config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
        monkeypatch.setenv("JUPYTERHUB_USER", "ada")
        jp_server_config.ServerApp.identity_provider_class = Hub
        return jp_server_config

    async def ask(self, server: Server, user: str, method: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"X-Test-User": user}
        return await server.client.request(method, f"{server.url}/llmcloud/api/{path}", json=body, headers=headers)

    async def test_a_guest_sees_revokes_and_rotates_the_keys_that_are_the_guests_own(self, server: Server) -> None:
        keys = {}
        for user in ("ada", "bob"):
            answer = await self.ask(server, user, "POST", "keys", {"scopes": ["models:read"]})
            assert answer.json()["owner"] == user
            keys[user] = answer.json()["id"]
        for user, seen in (("ada", {"ada", "bob"}), ("root", {"ada", "bob"}), ("bob", {"bob"})):
            rows = (await self.ask(server, user, "GET", "keys")).json()["keys"]
            assert {row["owner"] for row in rows} == seen
        assert (await self.ask(server, "bob", "DELETE", f"keys/{keys['ada']}")).status_code == 404
        assert (await self.ask(server, "bob", "POST", f"keys/{keys['ada']}/rotate", {})).status_code == 404
        assert (await self.ask(server, "bob", "DELETE", f"keys/{keys['bob']}")).status_code == 200
        assert (await self.ask(server, "ada", "POST", f"keys/{keys['ada']}/rotate", {})).status_code == 201

    async def test_a_guest_sees_the_usage_of_own_keys(self, server: Server) -> None:
        key = (await self.ask(server, "ada", "POST", "keys", {"scopes": ["models:read"]})).json()["id"]
        record = RequestRecord("r", f"key:{key}", "tiny", "completions", 200, 0.1, t=time.time())
        server.context.state.add_usage([record])
        server.context.audit.tell("server", "key.alert", key, rule="only refused", what="x")
        for user, number in (("ada", 1), ("bob", 0)):
            assert len((await self.ask(server, user, "GET", "keys/usage")).json()["usage"]) == number
            assert len((await self.ask(server, user, "GET", "keys/alerts")).json()["alerts"]) == number

    async def test_a_guest_is_told_of_own_keys_alone_as_they_change(self, server: Server) -> None:
        """REST showed a guest the guest's own keys, and the events all of them: labels, owners, scopes."""
        subscribe = json.dumps([{"type": "subscribe", "topics": ["keys"]}])
        sessions: dict[str, str] = {}

        async def seen(user: str, messages: str = "") -> set[str]:
            known = sessions.get(user, "")
            query = {"session": known, "received": str(numbers.get(user, 0)), "messages": messages, "wait_s": "1"}
            answer = (await self.ask(server, user, "GET", f"events/poll?{urlencode(query)}")).json()
            sessions[user], numbers[user] = answer["session"], answer["number"]
            items = [item for message in answer["messages"] for item in message.get("items", [message.get("item")])]
            return {item["owner"] for item in items if item}

        numbers: dict[str, int] = {}
        for user in ("ada", "bob"):
            await self.ask(server, user, "POST", "keys", {"scopes": ["models:read"], "label": f"of {user}"})
        for user, owners in (("ada", {"ada", "bob"}), ("root", {"ada", "bob"}), ("bob", {"bob"})):
            told = await seen(user, subscribe)
            while not told:
                told = await seen(user)
            assert told == owners
        await self.ask(server, "ada", "POST", "keys", {"scopes": ["models:read"]})
        await self.ask(server, "bob", "POST", "keys", {"scopes": ["models:read"]})
        told = await seen("bob")
        while not told:
            told = await seen("bob")
        assert told == {"bob"}

    async def test_a_guests_alerts_are_not_pushed_out_by_those_of_others(self, server: Server) -> None:
        keys = {}
        for user in ("ada", "bob"):
            keys[user] = (await self.ask(server, user, "POST", "keys", {"scopes": ["models:read"]})).json()["id"]
        server.context.audit.tell("server", "key.alert", keys["bob"], rule="only refused", what="x")
        for _ in range(3):
            server.context.audit.tell("server", "key.alert", keys["ada"], rule="only refused", what="x")
        for user, number in (("ada", 2), ("bob", 1)):
            rows = (await self.ask(server, user, "GET", "keys/alerts?limit=2")).json()["alerts"]
            assert len(rows) == number
