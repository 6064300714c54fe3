"""Two hundred clients hang up, while their prompts are read and while they are answered: the engine works for nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from tests.inference.test_inference_changes import ask, replica
from tests.support.tiny_models import one_thread, save_tiny_llama

LONG = "The while statement is used for repeated execution " * 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), context_length=1024)


async def stats(client: TestClient[Any, Any]) -> dict[str, Any]:
    async with client.get("/stats") as answer:
        told: dict[str, Any] = await answer.json()
        return told


@pytest.mark.parametrize("engine", ["slots", "continuous-batching"])
async def test_tokens_stop_within_a_step_and_every_gauge_is_back_at_zero(engine: str, model: Path) -> None:
    async with replica(engine, model) as client:
        before = await ask(client)
        turns = asyncio.Semaphore(8)

        async def hang_up(number: int) -> None:
            body = {"model": "tiny", "prompt": LONG, "max_tokens": 400, "stream": True, "logit_bias": {"1": -100}}
            async with turns:
                if number % 2:  # while it is answered
                    answer = await client.post("/v1/completions", json=body)
                    await answer.content.readany()
                    answer.close()
                else:  # while its prompt is read, or before
                    asking = asyncio.ensure_future(client.post("/v1/completions", json={**body, "stream": False}))
                    await asyncio.sleep(0.001 * (number % 10))
                    asking.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await asking

        await asyncio.gather(*(hang_up(number) for number in range(200)))

        async def is_quiet() -> bool:
            told = await stats(client)
            return not (told["num_open"] or told["num_sequences"] or told["engine"]["num_active"])

        deadline = asyncio.get_running_loop().time() + 30
        while not await is_quiet():
            assert asyncio.get_running_loop().time() < deadline, await stats(client)
            await asyncio.sleep(0.01)
        # What was in a step when the last one hung up may still be counted; then nothing is.
        num_tokens = (await stats(client))["engine"]["num_tokens"]
        last: list[int] = []
        for _ in range(10):
            last.append((await stats(client))["engine"]["num_tokens"])
            await asyncio.sleep(0.02)
        assert last[-1] == last[2] and last[-1] - num_tokens <= 8
        assert await ask(client) == before
