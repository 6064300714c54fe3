"""Both engines answer as the model does, let go of what nobody waits for, and say when they cannot go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines import kv_cache, select
from jupyter_llmcloud.inference.engines.base import Engine, EngineError, Generation, Sampling, TokenLogprob
from jupyter_llmcloud.inference.engines.continuous_batching import ContinuousBatchingEngine
from jupyter_llmcloud.inference.engines.generate import GenerateEngine
from jupyter_llmcloud.inference.engines.kv_cache import CachePlan, plan_cache
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.engines.slots.fused.decoder import FusedDecoder
from tests.support.tiny_models import TEXT, byte_level_tokenizer, one_thread, save_tiny_llama

GREEDY = Sampling(temperature=0.0)
DEADLINE_S = 30.0
Body = Callable[[Engine], Awaitable[None]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny_llama(tmp_path_factory.mktemp("model")))


def with_engine(engine: Callable[[], Awaitable[Engine]], body: Body) -> None:
    async def run() -> None:
        opened = await engine()
        try:
            await asyncio.wait_for(body(opened), DEADLINE_S)
        finally:
            await opened.close()

    asyncio.run(run())


async def collect(
    engine: Engine, generation: Generation, entries: list[TokenLogprob] | None = None
) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    reason = None
    async for batch in engine.submit(generation):
        tokens += batch.tokens
        if entries is not None:
            entries += batch.logprobs
        reason = batch.finish_reason
    return tokens, reason


def prompts(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.tokenizer(text)["input_ids"][: 3 + 2 * i] for i, text in enumerate(TEXT * 2)]


def generated_alone(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


async def settles(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def tried(loaded: LoadedModel) -> Callable[[], Awaitable[Engine]]:
    return lambda: open_engine(loaded, 8)


def batching(loaded: LoadedModel) -> Callable[[], Awaitable[Engine]]:
    return lambda: open_engine(loaded, 8, name="continuous-batching")


def generating(loaded: LoadedModel) -> Callable[[], Awaitable[Engine]]:
    async def make() -> Engine:
        return GenerateEngine(loaded, 8)

    return make


ENGINES = pytest.mark.parametrize("kind", [tried, batching, generating])


@ENGINES
def test_greedy_tokens_are_those_of_generate_alone_and_among_others(loaded: LoadedModel, kind: Any) -> None:
    expected = [generated_alone(loaded, prompt, 40) for prompt in prompts(loaded)]

    async def body(engine: Engine) -> None:
        alone = [await collect(engine, Generation(prompt, 40, GREEDY)) for prompt in prompts(loaded)]
        whole = [Generation(prompt, 40, GREEDY, incremental=False) for prompt in prompts(loaded)]
        together = await asyncio.gather(*(collect(engine, generation) for generation in whole))
        sampled = [Generation(prompt, 40, Sampling(top_k=5)) for prompt in prompts(loaded)[:4]]
        greedy = [Generation(prompt, 40, GREEDY) for prompt in prompts(loaded)[:4]]
        mixed = await asyncio.gather(*(collect(engine, generation) for generation in sampled + greedy))
        assert [tokens for tokens, _ in alone] == expected
        assert [tokens for tokens, _ in together] == expected
        assert [tokens for tokens, _ in mixed[4:]] == expected[:4]

    with_engine(kind(loaded), body)


@ENGINES
def test_a_seed_gives_the_same_tokens_whatever_else_runs(loaded: LoadedModel, kind: Any) -> None:
    generation = Generation(prompts(loaded)[0], 20, Sampling(seed=5, temperature=1.2))

    async def body(engine: Engine) -> None:
        alone = await collect(engine, generation)
        others = [Generation(prompt, 30) for prompt in prompts(loaded)[1:5]]
        together = await asyncio.gather(*(collect(engine, item) for item in [*others, generation]))
        assert together[-1] == alone
        unseeded = Generation(generation.prompt, 20, Sampling(temperature=1.2))
        assert (await collect(engine, unseeded))[0] != (await collect(engine, unseeded))[0]

    with_engine(kind(loaded), body)


@ENGINES
def test_the_end_of_sequence_token_ends_a_sequence_with_stop(loaded: LoadedModel, kind: Any) -> None:
    # A bias of 100 makes the end certain.
    ending = Generation(prompts(loaded)[0], 20, Sampling(temperature=0.0, logit_bias=((1, 100.0),)))

    async def body(engine: Engine) -> None:
        assert await collect(engine, ending) == ([1], "stop")
        assert (await collect(engine, Generation(prompts(loaded)[0], 4, GREEDY)))[1] == "length"

    with_engine(kind(loaded), body)


@ENGINES
def test_logprobs_come_with_every_token(loaded: LoadedModel, kind: Any) -> None:
    sampling = Sampling(temperature=0.0, num_logprobs=3)

    async def body(engine: Engine) -> None:
        tokens, entries = [], []
        async for batch in engine.submit(Generation(prompts(loaded)[0], 6, sampling)):
            tokens += batch.tokens
            entries += batch.logprobs
        assert [entry.token for entry in entries] == tokens
        assert all(entry.top[0] == (entry.token, entry.logprob) for entry in entries)
        assert all(len(entry.top) == 3 for entry in entries)

    with_engine(kind(loaded), body)


@ENGINES
def test_closing_a_stream_stops_its_tokens_within_a_step(loaded: LoadedModel, kind: Any) -> None:
    async def body(engine: Engine) -> None:
        stream = engine.submit(Generation(prompts(loaded)[0], 240, GREEDY))
        async for _ in stream:
            break
        stream.close()
        stream.close()
        assert engine.stats().num_active == 0
        at_close = engine.stats().num_tokens
        # A sequence after it in the same engine shows that steps went on, and how many.
        await collect(engine, Generation(prompts(loaded)[1], 20, GREEDY))
        assert engine.stats().num_tokens - at_close <= 20 + 2
        assert [batch async for batch in stream] == []

    with_engine(kind(loaded), body)


@ENGINES
def test_closing_the_engine_fails_what_goes_on(loaded: LoadedModel, kind: Any) -> None:
    async def body(engine: Engine) -> None:
        stream = engine.submit(Generation(prompts(loaded)[0], 240, GREEDY))
        closing = asyncio.create_task(engine.close())
        with pytest.raises(EngineError):
            async for _ in stream:
                pass
        await closing
        assert engine.stats().num_active == 0
        with pytest.raises(EngineError, match="closed"):
            engine.submit(Generation([2], 1))

    with_engine(kind(loaded), body)


def test_sequences_that_do_not_fit_the_cache_together_still_end_right(loaded: LoadedModel) -> None:
    expected = [generated_alone(loaded, prompt, 80) for prompt in prompts(loaded)]

    async def small() -> Engine:
        # 8 sequences of about 100 tokens, and pages for two of them.
        return ContinuousBatchingEngine(loaded, CachePlan(200, 8, 28, 64), 8)

    async def body(engine: Engine) -> None:
        wanted = [Generation(prompt, 80, GREEDY) for prompt in prompts(loaded)]
        answers = await asyncio.gather(*(collect(engine, generation) for generation in wanted))
        assert [tokens for tokens, _ in answers] == expected

    with_engine(small, body)


def begins_with_four_pages(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Awaitable[Engine]]:
    monkeypatch.setattr(kv_cache, "_AT_FIRST", {"cpu": 0})
    monkeypatch.setattr(kv_cache, "_MIN_TOKENS_AT_FIRST", 128)
    plan = plan_cache(
        loaded.model.config, torch.float32, context_length=256, max_concurrent=8, free=2**34, device_type="cpu"
    )

    async def make() -> Engine:
        return ContinuousBatchingEngine(loaded, plan, 8)

    return make


def test_a_cache_that_grows_under_running_sequences_changes_none_of_their_tokens(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [generated_alone(loaded, prompt, 80) for prompt in prompts(loaded)]
    seeded = Sampling(temperature=1.3, seed=11, num_logprobs=2)

    async def body(engine: Engine) -> None:
        assert engine.stats().num_cache_tokens == 128
        sampled = await collect(engine, Generation(prompts(loaded)[0], 40, seeded))
        assert engine.stats().num_cache_tokens == 128
        entries: list[TokenLogprob] = []
        again = asyncio.create_task(collect(engine, Generation(prompts(loaded)[0], 40, seeded), entries))
        wanted = [Generation(prompt, 80, GREEDY, incremental=n % 2 == 0) for n, prompt in enumerate(prompts(loaded))]
        answers = await asyncio.gather(*(collect(engine, generation) for generation in wanted))
        assert [tokens for tokens, _ in answers] == expected
        assert await again == sampled
        assert [entry.token for entry in entries] == sampled[0]
        stats = engine.stats()
        assert 1024 <= stats.num_cache_tokens <= stats.max_cache_tokens == 8 * 9 * 32
        assert 0 < stats.cache_bytes <= stats.max_cache_bytes

    with_engine(begins_with_four_pages(loaded, monkeypatch), body)


def test_what_is_cancelled_while_the_cache_grows_is_forgotten(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:

    async def body(engine: Engine) -> None:
        streams = [engine.submit(Generation(prompt, 200, GREEDY)) for prompt in prompts(loaded)]
        for stream in streams[1:]:
            stream.close()
        async for _ in streams[0]:
            break
        streams[0].close()
        await settles(lambda: engine.stats().num_active == 0)
        tokens, reason = await collect(engine, Generation(prompts(loaded)[0], 5, GREEDY))
        assert (tokens, reason) == (generated_alone(loaded, prompts(loaded)[0], 5), "length")

    with_engine(begins_with_four_pages(loaded, monkeypatch), body)


def test_a_cache_that_finds_no_memory_to_grow_ends_the_sequences_that_need_it_and_no_other(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = (prompts(loaded)[0] * 60)[:150]

    async def body(engine: Engine) -> None:
        short = asyncio.create_task(collect(engine, Generation(prompts(loaded)[0], 50, GREEDY)))
        await settles(lambda: engine.stats().num_tokens > 0)
        monkeypatch.setattr(kv_cache, "free_memory", lambda device: 0)
        with pytest.raises(EngineError, match="memory holds sequences of 64 tokens"):
            await collect(engine, Generation(prompt, 20, GREEDY))
        assert (await short)[0] == generated_alone(loaded, prompts(loaded)[0], 50)
        assert engine.context_length == 64
        assert engine.failure is None

    with_engine(begins_with_four_pages(loaded, monkeypatch), body)


def resident_memory() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.alone
def test_a_small_model_with_a_long_context_starts_at_once_and_in_little_memory(tmp_path: Path) -> None:
    long = load_model(save_tiny_llama(tmp_path, context_length=131072))
    before, began = resident_memory(), time.monotonic()

    async def body(engine: Engine) -> None:
        assert time.monotonic() - began < 4.0  # 17.5 s, when all of it was allocated
        assert resident_memory() - before < 256 << 20  # 6.2 GB
        assert engine.context_length == 131072
        prompt = prompts(long)[0]
        tokens, _ = await collect(engine, Generation(prompt * 400, 4, GREEDY))
        assert tokens == generated_alone(long, prompt * 400, 4)
        assert resident_memory() - before < 512 << 20

    with_engine(lambda: open_engine(long, 32), body)


@pytest.mark.alone
def test_the_first_answer_of_an_opened_engine_is_quick(loaded: LoadedModel) -> None:
    async def body(engine: Engine) -> None:
        begin = asyncio.get_running_loop().time()
        await collect(engine, Generation(prompts(loaded)[0], 4, GREEDY))
        assert asyncio.get_running_loop().time() - begin < 0.5

    with_engine(tried(loaded), body)


@pytest.mark.parametrize("kind", [tried, batching])
def test_a_step_that_fails_ends_every_stream_and_the_engine_says_so(
    loaded: LoadedModel, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the accelerator fell off the bus")

    async def body(engine: Engine) -> None:
        told: list[str] = []
        engine.on_failure = lambda: told.append("failed")
        streams = [engine.submit(Generation(prompt, 200, GREEDY)) for prompt in prompts(loaded)[:3]]
        async for _ in streams[0]:
            break
        monkeypatch.setattr(type(loaded.model), "forward", broken)
        monkeypatch.setattr(FusedDecoder, "run", broken)
        for stream in streams:
            with pytest.raises(EngineError, match="fell off the bus"):
                async for _ in stream:
                    pass
        await settles(lambda: bool(told))
        assert told == ["failed"]
        assert "fell off the bus" in (engine.failure or "")
        with pytest.raises(EngineError):
            engine.submit(Generation([2], 1))

    with_engine(kind(loaded), body)


def tiny(folder: Path, kind: str) -> Path:
    """Architectures that continuous batching cannot do, each for a reason of its own."""
    import transformers

    tokenizer = byte_level_tokenizer()
    size = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    configs = {
        "mamba": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **size),
        "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **size),
        "t5": lambda: transformers.T5Config(
            d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=1, **size
        ),
    }
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    auto.from_config(configs[kind]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["mamba", "bloom", "t5"])
def test_an_architecture_that_cannot_be_batched_is_served_one_sequence_per_thread(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = load_model(tiny(tmp_path, kind))
    prompt = prompts(other)[1]
    ids = torch.tensor([prompt])
    whole = other.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=[1]
    )[0].tolist()
    expected = whole[1:] if kind == "t5" else whole[len(prompt) :]

    async def body(engine: Engine) -> None:
        assert engine.name == "generate"
        wanted = [Generation(prompt, 8, GREEDY)] * 3
        answers = await asyncio.gather(*(collect(engine, generation) for generation in wanted))
        assert [tokens for tokens, _ in answers] == [expected] * 3

    with_engine(tried(other), body)
    assert "one sequence per thread" in caplog.text


def forward_alone(loaded: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by whole forward passes, with no cache and no state."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(loaded.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def recurrent_gemma(folder: Path) -> LoadedModel:
    import transformers

    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        lru_width=32, attention_window_size=64, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder)


def test_a_model_that_keeps_its_state_in_its_modules_answers_each_of_four_requests_as_it_would_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recurrent = recurrent_gemma(tmp_path)
    asked = prompts(recurrent)[:4]
    expected = [forward_alone(recurrent, prompt, 12) for prompt in asked]
    biased = Sampling(temperature=0.0, logit_bias=((1, -100.0),))

    async def body(engine: Engine) -> None:
        assert engine.num_parallel == 1
        answers = await asyncio.gather(*(collect(engine, Generation(prompt, 12, biased)) for prompt in asked))
        assert [tokens for tokens, _ in answers] == expected

    with_engine(tried(recurrent), body)
    assert "one sequence at a time: it keeps a state in its modules (model.layers.0.temporal_block." in caplog.text


def keeps_the_last_prompt(loaded: LoadedModel) -> Callable[..., Any]:
    """A forward pass with a state that belongs to whoever came last, kept where no module shows it."""
    forward, hidden = loaded.model.forward, {"shift": 0}

    def stateful(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        ids, cache = (
            named["input_ids"],
            named.get("past_key_values", named.get("cache")),
        )  # its name until transformers 5.24, and since
        is_prompt = named.get("use_cache") is False or cache is None or cache.get_seq_length() == ids.shape[1]
        if is_prompt:
            hidden["shift"] = int(ids[0, 0]) % 7
        output.logits = output.logits.roll(hidden["shift"], dims=-1)
        return output

    return stateful


def test_sequences_that_are_mixed_when_they_run_together_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = load_model(tiny(tmp_path, "bloom"))
    monkeypatch.setattr(other.model, "forward", keeps_the_last_prompt(other))
    asked = prompts(other)[:4]
    expected = [forward_alone(other, prompt, 6) for prompt in asked]

    async def body(engine: Engine) -> None:
        assert (engine.name, engine.num_parallel) == ("generate", 1)
        endless = Sampling(temperature=0.0, logit_bias=((1, -1000.0),))
        answers = await asyncio.gather(*(collect(engine, Generation(prompt, 6, endless)) for prompt in asked))
        assert [tokens for tokens, _ in answers] == expected

    with_engine(tried(other), body)
    assert "sequences that ran at once were mixed" in caplog.text


def test_a_model_that_is_wrong_also_one_sequence_at_a_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_model(tiny(tmp_path, "bloom"))
    forward = other.model.forward

    def wrong_with_a_cache(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        if named.get("use_cache") is not False:
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(other.model, "forward", wrong_with_a_cache)
    with pytest.raises(ModelError, match="what it generates is not what it computes: log probabilities are off"):
        asyncio.run(open_engine(other, 8))


def test_an_engine_that_disagrees_with_the_model_is_not_used(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = loaded.model.forward

    def silently_wrong(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        if isinstance(named.get("cache"), PagedAttentionCache):  # what a model that ignores it would do
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(loaded.model, "forward", silently_wrong)

    async def body(engine: Engine) -> None:
        assert engine.name == "generate"

    with_engine(tried(loaded), body)
    assert "log probabilities are off" in caplog.text


def test_a_transformers_with_other_private_parts_is_served_by_generate_and_the_log_says_why(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare_tensor_args(self: Any, scheduled: list[Any], storage: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called although it does not fit")

    monkeypatch.setattr(ContinuousBatchingLogitsProcessorList, "prepare_tensor_args", prepare_tensor_args)

    with pytest.raises(ModelError, match="--engine continuous-batching cannot serve this model"):
        asyncio.run(batching(loaded)())
    monkeypatch.setattr(select, "BATCHED", ("continuous-batching",))

    async def body(engine: Engine) -> None:
        assert engine.name == "generate"

    with_engine(tried(loaded), body)
    assert "prepare_tensor_args takes (scheduled, storage) instead of (requests_in_batch, arg_storage)" in caplog.text
    assert "The model is served by generate(), one sequence per thread." in caplog.text


@pytest.mark.parametrize(("free", "context", "pages"), [(2**34, 256, 8 * 9), (2**21, 256, 20), (2**20, 256, 10)])
def test_the_cache_holds_every_sequence_or_what_memory_allows(
    loaded: LoadedModel, free: int, context: int, pages: int
) -> None:
    plan = plan_cache(
        loaded.model.config,
        torch.float32,
        context_length=256,
        max_concurrent=8,
        free=free,
        device_type="cpu",
    )
    assert plan.context_length <= context
    assert plan.context_length <= (plan.num_pages - 2) * plan.page_size
    assert plan.num_pages <= pages


def test_a_model_that_memory_cannot_hold_is_refused_with_figures(loaded: LoadedModel) -> None:
    with pytest.raises(ModelError, match="one token takes"):
        plan_cache(
            loaded.model.config,
            torch.float32,
            context_length=256,
            max_concurrent=8,
            free=2**16,
            device_type="cpu",
        )


def _translator(**generation: Any) -> LoadedModel:
    """A tiny BART whose scores of its padding token are the largest, as those of Marian are."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.3,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias[0, 1] = 50.0
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    return LoadedModel(model, None, 64, 64, frozenset({2}), is_encoder_decoder=True)


@pytest.mark.parametrize(
    "generation",
    [
        {"bad_words_ids": [[1]]}, {"suppress_tokens": [1]}, {"bad_words_ids": [[1]], "forced_bos_token_id": 7},
        {"bad_words_ids": [[1]], "num_beams": 4, "no_repeat_ngram_size": 1, "repetition_penalty": 3.0, "min_length": 9},
    ],
    ids=["bad-words", "suppressed", "a-forced-begin", "beams-and-penalties"],
)  # fmt: skip
def test_a_translator_says_what_its_checkpoint_lets_it_say_one_token_after_the_other(
    generation: dict[str, Any],
) -> None:
    loaded = _translator(**generation)
    prompt = [5, 9, 20, 33, 2]
    plain = {"num_beams": 1, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "min_length": 0}
    wanted = loaded.model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=13, **plain
    )[0].tolist()  # fmt: skip

    async def answer() -> list[int]:
        engine = await open_engine(loaded, 2, 1)
        try:
            found: list[int] = []
            async for batch in engine.submit(Generation(prompt, 12, Sampling(temperature=0.0))):
                found += batch.tokens
            return found
        finally:
            await engine.close()

    assert asyncio.run(answer()) == wanted[1:13] and 1 not in wanted  # the last one would be the forced end


def test_a_model_that_computes_no_numbers_from_its_second_token_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_model(tiny(tmp_path, "bloom"))
    forward = other.model.forward

    def broken_with_a_cache(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        if named.get("use_cache") is not False and output.logits.shape[1] == 1:
            output.logits.fill_(torch.nan)
        return output

    monkeypatch.setattr(other.model, "forward", broken_with_a_cache)
    with pytest.raises(ModelError, match="log probabilities are off by nan"):
        asyncio.run(open_engine(other, 8))


def test_penalties_that_a_checkpoint_names_change_no_step_of_an_engine(tmp_path: Path) -> None:
    other = load_model(tiny(tmp_path, "bloom"))
    other.model.generation_config.repetition_penalty = 2.0
    other.model.generation_config.no_repeat_ngram_size = 2
    [prompt] = prompts(other)[3:4]

    async def body(engine: Engine) -> None:
        assert engine.name == "generate"
        tokens, _ = await collect(engine, Generation(prompt, 6, Sampling(temperature=0.0), ignore_eos=True))
        assert tokens == forward_alone(other, prompt, 6)

    with_engine(tried(other), body)
