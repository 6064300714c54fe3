"""Prompts that come at once are read together, and each has its first token before any of them has a second one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from jupyter_llmcloud.inference.engines.base import Generation, Sampling
from jupyter_llmcloud.inference.engines.kv_cache import CachePlan
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.slots import batch
from jupyter_llmcloud.inference.engines.slots.engine import SlotEngine
from jupyter_llmcloud.inference.engines.slots.forward import ForwardPass
from jupyter_llmcloud.inference.engines.slots.gathering import Gathering
from tests.inference.engines.architectures import CONFIGS, CONTEXT, tiny_model
from tests.inference.engines.test_slots import all_of, random_prompt
from tests.support.tiny_models import one_thread

PLAN = CachePlan(CONTEXT, 32, 4096, 64, 1 << 14)  # 64 tokens a step
PROMPTS = [random_prompt(seed, 32) for seed in range(8)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return tiny_model(CONFIGS["llama"])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many tokens each part of each step has."""
    taken: list[list[int]] = []
    run = ForwardPass.run

    def noted(self: ForwardPass, step: Any) -> Any:
        taken.append([len(part.tokens) for part in step.parts])
        return run(self, step)

    monkeypatch.setattr(ForwardPass, "run", noted)
    return taken


def answers_of(loaded: LoadedModel, prompts: list[list[int]], taken: list[list[int]]) -> list[list[int]]:
    async def ask() -> list[list[int]]:
        engine = SlotEngine(loaded, PLAN, 8, 1)
        taken.clear()
        try:
            return await all_of(engine, [Generation(prompt, 6, Sampling(temperature=0.0)) for prompt in prompts])
        finally:
            await engine.close()

    return asyncio.run(ask())


def test_a_burst_of_prompts_is_read_before_any_answer_goes_on_and_answers_as_alone(
    llama: LoadedModel, steps: list[list[int]]
) -> None:
    together = answers_of(llama, PROMPTS, steps)
    assert steps[:4] == [[32, 32]] * 4 and steps[4] == [1] * 8
    assert together == [answers_of(llama, [prompt], steps)[0] for prompt in PROMPTS]


def test_answers_go_on_while_more_is_read_than_a_short_burst(
    llama: LoadedModel, steps: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_SHORT_BURST", 32)
    answers_of(llama, PROMPTS, steps)
    assert 1 in steps[1] and 32 in steps[1]


def rounds_of(added: list[bool], *, is_idle: bool = True) -> list[int]:
    """After which rounds of an event loop, in some of which something was added, it was handed on."""
    handed: list[int] = []

    async def main() -> None:
        number = 0
        gathering = Gathering(lambda: handed.append(number), clock=lambda: 0.0)
        for number, is_added in enumerate(added):  # noqa: B007 - the lambda reads it
            if is_added:
                gathering.added(asyncio.get_running_loop(), is_idle=is_idle)
            await asyncio.sleep(0)

    asyncio.run(main())
    return handed


def test_what_comes_round_after_round_is_handed_on_once_and_a_lone_one_soon() -> None:
    alone, few = rounds_of([True, *[False] * 9]), rounds_of([True, True, False, True, *[False] * 9])
    assert len(alone) == len(few) == 1 and few[0] == alone[0] + 3
    assert rounds_of([True, True, *[False] * 9], is_idle=False)[0] < alone[0]
    assert len(rounds_of([True, *[False] * 9, True, *[False] * 9])) == 2


def test_what_never_ends_is_handed_on_all_the_same() -> None:
    async def main() -> int:
        now, handed = 0.0, []
        gathering = Gathering(lambda: handed.append(now), clock=lambda: now)
        for _ in range(100):
            gathering.added(asyncio.get_running_loop(), is_idle=True)
            now += 0.001
            await asyncio.sleep(0)
        return len(handed)

    assert asyncio.run(main()) >= 5
