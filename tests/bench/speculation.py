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
_NUM_COLD = 64


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
    from jupyter_llmcloud.inference.engines.base import Generation, Sampling
    from jupyter_llmcloud.inference.engines.loading import load_model
    from jupyter_llmcloud.inference.engines.select import open_engine
    from jupyter_llmcloud.inference.engines.slots.engine import SlotEngine

    engine = await open_engine(load_model(model), 4, 1, "slots")
    assert isinstance(engine, SlotEngine)
    speculation = engine._core.batch.speculation
    allows = speculation.allows

    async def answer(prompt: list[int], count: int, *, guesses: bool, temperature: float = 0.0) -> tuple[float, list[int]]:
        speculation.allows = allows if guesses else (lambda _: False)  # type: ignore[method-assign]
        began, tokens = time.perf_counter(), []
        sampling = Sampling(temperature=temperature, seed=3)
        async for batch in engine.submit(Generation(prompt, count, sampling, ignore_eos=True)):
            tokens += batch.tokens
        return count / (time.perf_counter() - began), tokens

    def prompts() -> dict[str, list[int]]:
        return {
            "repeats": list(range(2, 34)),
            "does not repeat": [5 + 7 * place % 290 for place in range(32)],
        }

    speeds: dict[tuple[str, bool], list[float]] = {}
    # A greedy model of random weights soon says the same again; its text until then is one that does not repeat.
    counts = {"repeats": _NUM_TOKENS, "does not repeat": _NUM_COLD}
    try:
        for _ in range(ROUNDS):
            for name, prompt in prompts().items():
                if name == "repeats":
                    _, said = await answer(prompt, _NUM_TOKENS, guesses=False)
                    prompt = [*prompt, *said, *prompt]
                answers = []
                for guesses in (False, True):
                    await answer(prompt, 2, guesses=False)  # its prompt is known now
                    speed, tokens = await answer(prompt, counts[name], guesses=guesses)
                    speeds.setdefault((name, guesses), []).append(speed)
                    answers.append(tokens)
                if answers[0] != answers[1]:
                    raise AssertionError("guesses have changed an answer")
    finally:
        await engine.close()
    return [
        Row("serving", f"guesses at 1 stream, a text that {name}", "tokens/s", "ours, without guesses",
            speeds[name, True], speeds[name, False], goal, at_least=True)
        for name, goal in (("repeats", 1.2), ("does not repeat", 0.95))
    ]  # fmt: skip
