"""How long bad requests wait for their refusal: those that the gateway turns away, and those that a replica does."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from tests.bench.measured import Row
from tests.bench.serving_peers import replica
from tests.support.gateway_process import GatewayProcess
from tests.support.tiny_models import CHAT_TEMPLATE, save_tiny_llama

ROUNDS = 20
LIMIT_MS = 50.0
_DEEP = 10_000
_ASKED = [{"role": "user", "content": "Hello"}]


class Bad(NamedTuple):
    """A request that is refused."""

    name: str
    status: int
    body: bytes
    route: str = "completions"


def _body(model: Any = "tiny", **fields: Any) -> bytes:
    prompt = {} if "messages" in fields or "prompt" in fields else {"prompt": "hello"}
    return json.dumps({"model": model, **prompt, **fields}).encode()


def _of_replica(**fields: Any) -> bytes:
    return _body("bench", **fields)


AT_THE_GATEWAY = (
    Bad("a model that the key may not ask", 403, _body(model="nothing")),
    Bad("not JSON", 400, b"{"),
    Bad("10,000 deep", 400, b"[" * _DEEP + b"]" * _DEEP),
    Bad("a model that is no text", 400, _body(model=7)),
    Bad("10 MB", 413, _body(prompt="x" * (10 << 20))),
)
AT_THE_REPLICA = (
    Bad("max_tokens 1e9", 400, _of_replica(max_tokens=10**9)),
    Bad("n 1e6", 400, _of_replica(n=10**6)),
    Bad("temperature NaN", 400, _of_replica(temperature=float("nan"))),
    Bad("temperature of a wrong type", 400, _of_replica(temperature="hot")),
    Bad("50,000 marks", 400, _of_replica(prompt="!" * 50_000)),
    Bad("a parameter that is unknown", 400, _of_replica(best_off=3)),
    Bad("best_of", 400, _of_replica(best_of=3)),
    Bad("content of a wrong type", 400, _of_replica(messages=[{"role": "user", "content": 7}]), "chat/completions"),
    Bad(
        "a grammar that is none",
        400,
        _of_replica(messages=_ASKED, response_format={"type": "regex", "regex": "("}),
        "chat/completions",
    ),
)


async def gateway_refusals(server: GatewayProcess) -> Row:
    """Of the gateway, with a key; and without one."""
    url = f"{server.url}llmcloud/v1"
    key = {"Authorization": f"Bearer {server.key}"}
    async with aiohttp.ClientSession() as client:
        samples = [await _refused(client, url, bad, key) for bad in AT_THE_GATEWAY for _ in range(ROUNDS)]
        samples += [await _refused(client, url, Bad("no key", 401, _body()), {}) for _ in range(ROUNDS)]
    return Row("gateway", "a refusal by the gateway, p99", "ms", "", samples, limit=LIMIT_MS, percent=99)


async def replica_refusals(folder: Path) -> Row:
    """Of a replica, asked directly."""
    model = save_tiny_llama(folder / "refusing", chat_template=CHAT_TEMPLATE)
    place = folder / "r"
    place.mkdir()
    async with replica(place, model, "slots") as served:
        url = f"{served.base}/v1"
        for bad in AT_THE_REPLICA:
            await _refused(served.client, url, bad, {})
        samples = [await _refused(served.client, url, bad, {}) for bad in AT_THE_REPLICA for _ in range(ROUNDS)]
    return Row("gateway", "a refusal by a replica, p99", "ms", "", samples, limit=LIMIT_MS, percent=99)


async def _refused(client: aiohttp.ClientSession, url: str, bad: Bad, headers: dict[str, str]) -> float:
    headers = {**headers, "Content-Type": "application/json"}
    began = time.perf_counter()
    async with client.post(f"{url}/{bad.route}", data=bad.body, headers=headers) as answer:
        text = await answer.text()
        took_ms = (time.perf_counter() - began) * 1e3
    if answer.status != bad.status or "error" not in text:
        raise AssertionError(f"{bad.name}: {answer.status} {text[:300]}")
    return took_ms
