"""What guesses of the next tokens give one stream, where a text repeats what was said, and where it does not.

The engine alone, in this process: with guesses, and with the same engine that makes none. The answers must be the same.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.bench.measured import Row

ROUNDS = 4
_NUM_TOKENS = 128
_NUM_ROUND = 400


def speculation_rows(model: Path) -> list[Row]:
    """Tokens per second, a text that repeats and one that does not in turn, with guesses and without."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return asyncio.run(_rows(model))
    finally:
        torch.set_num_threads(before)


async def _rows(model: Path) -> list[Row]:
    rows = []
    for name, goal in (("repeats", 1.2), ("does not repeat", 0.95)):
        without, with_guesses = await _speeds(model, repeats=name == "repeats")
        what = f"guesses at 1 stream, a text that {name}"
        rows.append(
            Row("serving", what, "tokens/s", "ours, without guesses", with_guesses, without, goal, at_least=True)
        )
    return rows


async def _speeds(model: Path, *, repeats: bool) -> tuple[list[float], list[float]]:
    from jupyter_llmcloud.inference.engines.base import Generation, Sampling
    from jupyter_llmcloud.inference.engines.loading import load_model
    from jupyter_llmcloud.inference.engines.select import open_engine
    from jupyter_llmcloud.inference.engines.slots.engine import SlotEngine

    loaded = load_model(model)
    if repeats:  # without what attention says, the next token follows from the last one, and a text goes round
        for layer in loaded.model.model.layers:
            layer.self_attn.o_proj.weight.detach().zero_()
    engine = await open_engine(loaded, 4, 1, "slots")
    assert isinstance(engine, SlotEngine)
    speculation = engine._core.batch.speculation
    allows = speculation.allows

    async def answer(prompt: list[int], count: int, *, guesses: bool) -> tuple[float, list[int]]:
        speculation.allows = allows if guesses else (lambda _: False)  # type: ignore[method-assign]
        began, tokens = time.perf_counter(), []
        async for batch in engine.submit(Generation(prompt, count, Sampling(temperature=0.0), ignore_eos=True)):
            tokens += batch.tokens
        return count / (time.perf_counter() - began), tokens

    speeds: dict[bool, list[float]] = {False: [], True: []}
    try:
        prompt = [5 + 7 * place % 290 for place in range(32)]
        if repeats:
            prompt += (await answer(prompt, _NUM_ROUND, guesses=False))[1]
        for _ in range(ROUNDS):
            answers = []
            for guesses in (False, True):
                await answer(prompt, 2, guesses=False)  # its prompt is known now
                speed, tokens = await answer(prompt, _NUM_TOKENS, guesses=guesses)
                speeds[guesses].append(speed)
                answers.append(tokens)
            if answers[0] != answers[1]:
                raise AssertionError("guesses have changed an answer")
    finally:
        await engine.close()
    return speeds[False], speeds[True]
