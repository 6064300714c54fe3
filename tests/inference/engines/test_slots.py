"""The slot engine answers as the model itself does, for every architecture, in any company, and counts what it holds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.base import EngineError, Generation, Sampling, TokenLogprob
from jupyter_llmcloud.inference.engines.kv_cache import CachePlan
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.engines.slots import forward, speculation, step
from jupyter_llmcloud.inference.engines.slots.engine import SlotEngine
from jupyter_llmcloud.inference.engines.slots.forward import ForwardPass
from jupyter_llmcloud.inference.engines.slots.kv_slots import SlotGroup
from jupyter_llmcloud.inference.engines.slots.packed_linear import Packed, why_not_packed
from jupyter_llmcloud.inference.engines.slots.step import Bundle, Part
from tests.inference.engines.architectures import CONFIGS, CONTEXT, OTHERS, VOCABULARY, tiny_model
from tests.support.tiny_models import one_thread

GREEDY = Sampling(temperature=0.0)
DEADLINE_S = 60.0
PLENTY = CachePlan(CONTEXT, 32, 4096, 64, 1 << 14)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return tiny_model(CONFIGS["llama"])


def with_slots(
    loaded: LoadedModel, body: Callable[[SlotEngine], Awaitable[None]], plan: CachePlan = PLENTY, num_parallel: int = 8
) -> None:
    async def run() -> None:
        engine = SlotEngine(loaded, plan, num_parallel, 1)
        try:
            await asyncio.wait_for(body(engine), DEADLINE_S)
        finally:
            await engine.close()
        assert engine.stats().cache_bytes == 0

    asyncio.run(run())


async def collect(
    engine: SlotEngine, generation: Generation, entries: list[TokenLogprob] | None = None
) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    reason = None
    async for batch in engine.submit(generation):
        tokens += batch.tokens
        reason = batch.finish_reason
        if entries is not None:
            entries += batch.logprobs
    return tokens, reason


async def all_of(engine: SlotEngine, wanted: list[Generation]) -> list[list[int]]:
    answers = await asyncio.gather(*(collect(engine, generation) for generation in wanted))
    return [tokens for tokens, _ in answers]


def random_prompt(seed: int, length: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(2, VOCABULARY) for _ in range(length)]


@torch.inference_mode()
def plain(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by whole forward passes over one sequence, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        scores = loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(scores.argmax()))
        if tokens[-1] in loaded.eos:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_sequences_of_any_length_that_join_at_any_time_are_those_of_plain_forward_passes(architecture: str) -> None:
    loaded = tiny_model(CONFIGS[architecture])
    # Shorter and longer than a window, than a part of a prompt (64 tokens) and than the smallest slot (128 tokens).
    lengths = (1, 7, 40, 65, 100, 120)
    prompts = [random_prompt(length, length) for length in lengths]
    expected = [plain(loaded, prompt, 14) for prompt in prompts]

    async def body(engine: SlotEngine) -> None:
        async def later(number: int) -> list[int]:
            while engine.stats().num_active and engine.stats().num_tokens < 3 * number:
                await asyncio.sleep(0.001)
            return (await collect(engine, Generation(prompts[number], 14, GREEDY)))[0]

        joining = await asyncio.gather(*(later(number) for number in range(len(prompts))))
        assert joining == expected
        assert await all_of(engine, [Generation(prompt, 14, GREEDY) for prompt in prompts]) == expected

    with_slots(loaded, body)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_prompts_of_about_one_length_are_read_together_as_those_of_plain_forward_passes(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, seen, bundled = tiny_model(CONFIGS[architecture]), [], step._bundled

    def noted(parts: list[Part], device: torch.device) -> list[Bundle]:
        found = bundled(parts, device)
        seen.append([len(bundle.parts) for bundle in found])
        return found

    monkeypatch.setattr(step, "_bundled", noted)
    # Of one length, of nearly one, and one that would be mostly padding; all of it in one step.
    prompts = [random_prompt(seed, length) for seed, length in enumerate((12, 12, 14, 11, 3))]
    expected = [plain(loaded, prompt, 5) for prompt in prompts]

    async def body(engine: SlotEngine) -> None:
        assert await all_of(engine, [Generation(prompt, 5, GREEDY) for prompt in prompts]) == expected

    with_slots(loaded, body)
    assert [4, 1] in seen


@pytest.mark.parametrize("architecture", CONFIGS)
def test_auto_takes_slots_for(architecture: str) -> None:
    async def run() -> None:
        engine = await open_engine(tiny_model(CONFIGS[architecture]), 4, 1)
        try:
            assert engine.name == "slots"
            assert engine.unsupported == {"adapter"}
        finally:
            await engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("architecture", OTHERS)
def test_an_architecture_that_slots_cannot_do_is_refused_by_name_and_served_otherwise(architecture: str) -> None:
    loaded = tiny_model(OTHERS[architecture])

    async def run() -> None:
        with pytest.raises(ModelError, match="--engine slots cannot serve this model: "):
            await open_engine(loaded, 4, 1, "slots")
        engine = await open_engine(loaded, 4, 1)
        try:
            assert engine.name == "generate"
            assert (await collect(engine, Generation([2, 3, 4], 6, GREEDY)))[0] == plain(loaded, [2, 3, 4], 6)  # type: ignore[arg-type]
        finally:
            await engine.close()

    asyncio.run(run())


def test_random_batches_with_little_memory_and_hang_ups_answer_each_sequence_as_alone(llama: LoadedModel) -> None:
    drawn = random.Random(5)
    prompts = [random_prompt(seed, drawn.choice((1, 5, 33, 90, 150))) for seed in range(24)]
    counts = [drawn.choice((1, 9, 40)) for _ in prompts]
    expected = [plain(llama, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    # 3 layers, 2 key heads of 12, 4 bytes: 576 bytes a token; two slots of 256 tokens and two of 128.
    tight = CachePlan(CONTEXT, 32, 24, 48, 32 * 576)

    async def body(engine: SlotEngine) -> None:
        async def hangs_up(prompt: list[int]) -> None:
            stream = engine.submit(Generation(prompt, 60, GREEDY))
            async for _ in stream:
                break
            stream.close()

        wanted = [Generation(prompt, count, GREEDY) for prompt, count in zip(prompts, counts, strict=True)]
        answers, *_ = await asyncio.gather(all_of(engine, wanted), *(hangs_up(prompt) for prompt in prompts[:12]))
        assert answers == expected
        assert engine.stats().num_active == 0
        assert engine.stats().cache_bytes <= engine.stats().max_cache_bytes

    with_slots(llama, body, tight)


def test_an_event_loop_that_closes_takes_nothing_from_those_of_another_one(llama: LoadedModel) -> None:
    engine = SlotEngine(llama, PLENTY, 4, 1)

    async def leave() -> None:
        engine.submit(Generation(random_prompt(1, 5), 200, Sampling(temperature=0)))
        await asyncio.sleep(0)

    async def ask() -> list[int]:
        tokens, _ = await asyncio.wait_for(collect(engine, Generation(prompt, 8, Sampling(temperature=0))), DEADLINE_S)
        return tokens

    async def end() -> None:
        await engine.close()

    prompt = random_prompt(2, 6)
    asyncio.run(leave())  # and closes its loop while the engine goes on
    assert asyncio.run(ask()) == plain(llama, prompt, 8)
    asyncio.run(end())


def test_a_sequence_that_memory_cannot_hold_fails_and_no_other(llama: LoadedModel) -> None:
    async def body(engine: SlotEngine) -> None:
        long = asyncio.create_task(collect(engine, Generation(random_prompt(1, 140), 5, GREEDY)))
        short = await collect(engine, Generation(random_prompt(2, 20), 30, GREEDY))
        assert short[0] == plain(llama, random_prompt(2, 20), 30)
        with pytest.raises(EngineError, match="memory holds sequences of about 160 tokens"):
            await long

    with_slots(llama, body, CachePlan(CONTEXT, 32, 5, 64, 32 * 576))


def test_a_prompt_that_begins_as_an_earlier_one_is_read_from_where_they_differ(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = random_prompt(3, 150)
    first, second = [*shared, *random_prompt(4, 10)], [*shared, *random_prompt(5, 10)]
    expected = [plain(llama, prompt, 8) for prompt in (first, second)]

    async def body(engine: SlotEngine) -> None:
        read: list[int] = []
        run = engine._core.batch._forward.run

        def counted(step: Any) -> torch.Tensor:
            read.append(step.ids.shape[1])
            return run(step)

        monkeypatch.setattr(engine._core.batch._forward, "run", counted)
        assert (await collect(engine, Generation(first, 8, GREEDY)))[0] == expected[0]
        assert sum(read) >= 160
        read.clear()
        assert (await collect(engine, Generation(second, 8, GREEDY)))[0] == expected[1]
        assert sum(read) <= 160 - 128 + 8
        read.clear()
        assert (await collect(engine, Generation(first, 8, GREEDY)))[0] == expected[0]
        assert sum(read) <= 32 + 8

    with_slots(llama, body)


def test_guesses_change_no_answer_spare_steps_and_stop_where_they_are_wrong(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(llama, [5, 6, 7], 120)
    # The right guesses are those of a sequence that says the same again.
    prompt = [5, 6, 7, *expected, 5, 6, 7]
    again = plain(llama, prompt, 60)
    monkeypatch.setattr(speculation.Speculation, "needed", lambda *_: 0.2)
    endless = Sampling(temperature=0.0)

    async def body(engine: SlotEngine) -> None:
        assert (await collect(engine, Generation(prompt, 60, endless, ignore_eos=False)))[0] == again

    with_slots(llama, body)


def test_guesses_are_judged_by_what_steps_cost() -> None:
    cost = speculation.Speculation()
    assert cost.allows(1)
    assert not cost.allows(32)
    cost.note(1, 0.004)
    cost.note(7, 0.008)
    assert cost.needed(1, 6) == pytest.approx(1 / 6)
    drafts = speculation.Drafts()
    tokens = [1, 2, 3, 4, 5, 1, 2, 3]
    assert drafts.propose(tokens, 10) == [4, 5, 1, 2, 3]
    for _ in range(6):
        drafts.judge(5, 0, needed=0.3)
    assert drafts.propose(tokens, 10) == []
    assert speculation.Drafts().propose([1, 2, 3, 4], 10) == []


def test_the_prompts_tokens_are_scored_and_the_answer_may_be_empty(llama: LoadedModel) -> None:
    prompt = random_prompt(9, 130)  # read in three parts
    with torch.inference_mode():
        expected = llama.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
    sampling = Sampling(temperature=0.0, num_logprobs=2)

    async def body(engine: SlotEngine) -> None:
        for max_tokens in (0, 3):
            entries: list[TokenLogprob] = []
            wanted = Generation(prompt, max_tokens, sampling, score_prompt=True)
            tokens, reason = await collect(engine, wanted, entries)
            assert (len(tokens), reason) == (max_tokens, "length")
            assert [entry.token for entry in entries] == prompt[1:] + tokens
            for place, entry in enumerate(entries[: len(prompt) - 1]):
                assert entry.logprob == pytest.approx(float(expected[place, entry.token]), abs=1e-3)
                assert len(entry.top) == 2

    with_slots(llama, body)


class EvenOnly:
    """Even and odd tokens in turn."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> bytes:
        return (b"\xaa" if len(self.accepted) % 2 else b"\x55") * 12

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("name", ["slots", "continuous-batching", "generate"])
def test_every_field_of_a_generation_is_honoured_by(name: str, llama: LoadedModel) -> None:
    prompt = random_prompt(11, 12)
    free = plain(llama, prompt, 12)
    ending = Sampling(temperature=0.0, logit_bias=((1, 100.0),))

    async def run() -> None:
        engine: Any = await open_engine(llama, 4, 1, name)
        try:
            await body(engine)
        finally:
            await engine.close()

    async def body(engine: Any) -> None:
        assert (await collect(engine, Generation(prompt, 9, ending, min_tokens=4)))[0][:-1].count(1) == 0
        assert len((await collect(engine, Generation(prompt, 9, ending, min_tokens=4)))[0]) == 5
        assert await collect(engine, Generation(prompt, 5, ending, ignore_eos=True)) == ([1] * 5, "length")
        stopped, reason = await collect(engine, Generation(prompt, 12, GREEDY, stop_token_ids=(free[3],)))
        assert (stopped, reason) == (free[: free.index(free[3]) + 1], "stop")
        constraint = EvenOnly()
        followed, _ = await collect(
            engine, Generation(prompt, 8, Sampling(seed=3), constraint=constraint, ignore_eos=True)
        )
        assert [token % 2 for token in followed] == [0, 1] * 4
        assert constraint.accepted == followed[:-1]
        repeated = Sampling(temperature=0.0, repetition_penalty=1e6)
        unique, _ = await collect(engine, Generation(prompt, 20, repeated, ignore_eos=True))
        assert len({*unique, *prompt}) == 20 + len(set(prompt))
        likeliest, _ = await collect(engine, Generation(prompt, 8, Sampling(min_p=1.0)))
        assert likeliest == free[:8]
        assert await collect(engine, Generation(prompt, 0, GREEDY)) == ([], "length")

    asyncio.run(run())


class WithAdapter(torch.nn.Linear):
    """A linear layer that something small is added to, as adapters do it."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) + 1e-5 * rows.sum(-1, keepdim=True)


class Linear(torch.nn.Module):
    """An adapter as PEFT has them: also named Linear, around the layer."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = inner

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.base_layer(rows) + 1e-5 * rows.sum(-1, keepdim=True)


def test_layers_of_the_llama_family_are_fused_unless_something_was_put_into_them() -> None:
    assert _is_fused(tiny_model(CONFIGS["llama"]))
    assert _is_fused(tiny_model(CONFIGS["qwen3"]))
    assert not _is_fused(tiny_model(CONFIGS["gemma"]))
    adapted = tiny_model(CONFIGS["llama"])
    attention = adapted.model.model.layers[1].self_attn
    plain = attention.v_proj
    attention.v_proj = Linear(plain)
    assert not _is_fused(adapted)
    attention.v_proj = WithAdapter(plain.in_features, plain.out_features, bias=False)
    assert not _is_fused(adapted)
    attention.v_proj = plain
    plain.register_forward_hook(lambda *_: None)
    assert not _is_fused(adapted)


def _is_fused(loaded: LoadedModel) -> bool:
    return ForwardPass(loaded).decoder is not None


@pytest.mark.parametrize("architecture", ["llama with biases", "mistral, a window of 24", "qwen2", "qwen3"])
def test_a_fused_decoder_runs_without_the_interpreter_and_the_same_where_that_cannot_be(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("torch.jit is not there any more")

    loaded, wanted = tiny_model(CONFIGS[architecture]), [Generation(random_prompt(7, 9), 12, GREEDY, ignore_eos=True)]
    decoder = ForwardPass(loaded).decoder
    assert decoder is not None and isinstance(decoder.layers, torch.jit.ScriptModule)

    async def body(engine: SlotEngine) -> None:
        assert await all_of(engine, wanted) == [plain(loaded, random_prompt(7, 9), 12)]

    with_slots(loaded, body)
    monkeypatch.setattr(torch.jit, "script", refused)
    with_slots(loaded, body)


def test_without_packed_weights_the_answers_are_the_same(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "why_not_packed", lambda *_: "oneDNN is not there")
    prompts = [random_prompt(seed, 20 + seed) for seed in range(4)]

    async def body(engine: SlotEngine) -> None:
        answers = await all_of(engine, [Generation(prompt, 20, GREEDY) for prompt in prompts])
        assert answers == [plain(llama, prompt, 20) for prompt in prompts]

    with_slots(llama, body)


def test_packed_weights_give_a_row_the_same_numbers_in_any_company() -> None:
    if reason := why_not_packed(torch.float32, torch.device("cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    for size_out, size_in in ((96, 64), (384, 1024)):
        layer = Packed(torch.randn(size_out, size_in), torch.randn(size_out))
        rows = torch.randn(65, size_in)
        whole = layer(rows)
        for number in (2, 3, 5, 8, 17, 32, 64):
            assert torch.equal(layer(rows[:number].contiguous()), whole[:number])


def test_a_hang_up_while_the_prompt_is_read_frees_its_slot_within_a_step(llama: LoadedModel) -> None:
    async def body(engine: SlotEngine) -> None:
        for _ in range(20):
            streams = [engine.submit(Generation(random_prompt(seed, 200), 20, GREEDY)) for seed in range(6)]
            await asyncio.sleep(0.002)
            for stream in streams:
                stream.close()
            assert engine.stats().num_active == 0
        counted = engine.stats().num_tokens
        await collect(engine, Generation([2, 3], 10, GREEDY, ignore_eos=True))
        assert engine.stats().num_tokens - counted <= 10 + 6
        assert not engine._core.batch.running

    with_slots(llama, body)


def test_the_number_of_threads_may_change_at_any_time(llama: LoadedModel) -> None:
    async def body(engine: SlotEngine) -> None:
        seen: list[int] = []
        run = engine._core.batch._forward.run
        engine._core.batch._forward.run = lambda step: seen.append(torch.get_num_threads()) or run(step)  # type: ignore[func-returns-value, method-assign]
        await collect(engine, Generation([2, 3], 4, GREEDY, ignore_eos=True))
        engine.num_threads = 2
        await collect(engine, Generation([2, 3], 4, GREEDY, ignore_eos=True))
        assert set(seen[:4]) == {1}
        assert set(seen[-3:]) == {2}

    with_slots(llama, body)


def test_positions_that_would_change_beyond_the_context_are_not_looked_up_there() -> None:
    """A rotation that is computed anew for long sequences is one table as long as the context ends before."""
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    loaded = replace(tiny_model(lambda: changed(CONFIGS["llama"](), rope_parameters=parameters)), context_length=64)
    assert _is_fused(loaded)

    async def body(engine: SlotEngine) -> None:
        prompt = random_prompt(3, 40)
        assert (await collect(engine, Generation(prompt, 20, GREEDY)))[0] == plain(loaded, prompt, 20)

    with_slots(loaded, body, CachePlan(64, 32, 4096, 64, 1 << 14))


def changed(config: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("architecture", ["llama", "gpt-oss, sinks"])
def test_a_sequence_that_cannot_be_computed_is_told_so_and_changes_no_other(architecture: str) -> None:
    """Its keys and values stayed in its slot: what a later sequence there does not see was NaN times 0."""
    loaded = tiny_model(CONFIGS[architecture])
    bad = 7
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[bad] = torch.nan
    long, short = ([token for token in random_prompt(1, length) if token != bad] for length in (120, 10))
    sound = [Generation(prompt, 6, GREEDY) for prompt in (long, short)]
    drawn = Sampling(temperature=1.0, num_logprobs=1)
    broken = [Generation([*long, bad, *long], 4, GREEDY), Generation([bad, *short], 4, drawn)]

    async def body(engine: SlotEngine) -> None:
        wanted = [plain(loaded, generation.prompt, 6) for generation in sound]
        for _ in range(2):
            told = await asyncio.gather(*(collect(engine, one) for one in broken), return_exceptions=True)
            assert await all_of(engine, sound) == wanted
            assert all(isinstance(one, EngineError) and "NaN" in str(one) for one in told), told

    with_slots(loaded, body)


def test_whatever_a_slot_held_before_an_answer_is_that_of_the_sequence_alone(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one leaves it whose client has gone before its scores were known."""
    resize = SlotGroup.resize

    def used(group: SlotGroup, num_rows: int) -> None:
        before = group.num_rows
        resize(group, num_rows)
        for layer in group.layers:
            layer[before:] = torch.nan

    monkeypatch.setattr(SlotGroup, "resize", used)
    wanted = [Generation(random_prompt(seed, length), 12, GREEDY) for seed, length in enumerate((100, 30, 5))]

    async def body(engine: SlotEngine) -> None:
        assert await all_of(engine, wanted) == [plain(llama, one.prompt, 12) for one in wanted]

    with_slots(llama, body)
