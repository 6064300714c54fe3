"""Models before and after, measured as they are served: two in turns, so that both see the same machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from jupyter_llmcloud.compression.measure.replica import MeasuredReplica, prepare
from jupyter_llmcloud.compression.sources import SourceModel, find_source
from jupyter_llmcloud.compression.texts import read_texts, windows
from jupyter_llmcloud.core.compression.table import MeasuredModel
from jupyter_llmcloud.errors import LLMCloudError, ModelError, UsageError
from jupyter_llmcloud.protocol.compression import Caption, Event, MeasureRequest, ModelMeasured
from jupyter_llmcloud.protocol.model_work import WorkProgress

Tell = Callable[[Event], None]
ROUNDS = 5
AT_ONCE = 8
NEW_TOKENS, PROMPT_TOKENS = 64, 32
_SCORED_TOKENS = 16_384
_LONGEST_WINDOW = 512
_LARGEST_LOSS = 700.0  # of a token, whose exponential is still a number
_WRITTEN, _LONGEST_WRITTEN = 32, 128


@dataclass
class _Figures:
    """What the rounds of one model gave."""

    first_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    batch_rates: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Texts:
    """The tokens that all models are measured with.

    Attributes:
        scored: windows that perplexity is of.
        prompts: what generation begins with; no two alike, so that none is in a cache.
        num_new: tokens that are generated after each.
    """

    scored: list[list[int]]
    prompts: list[list[int]]
    num_new: int
    told: str

    @property
    def num_scored(self) -> int:
        return sum(len(window) - 1 for window in self.scored)


def measure(request: MeasureRequest, tell: Tell) -> None:
    """Measure the first model and, beside it, each of the others."""
    num_threads = max(1, len(os.sched_getaffinity(0)) - 1)
    context = prepare(num_threads)
    base = request.base_model
    sources = [find_source(model, "" if number else base) for number, model in enumerate(request.models)]
    before, figures = sources[0], _Figures()
    tell(WorkProgress(text=f"{before.name} is started as an endpoint would"))

    def start(source: SourceModel) -> MeasuredReplica:
        return MeasuredReplica(context, source.layout, num_threads)

    with start(before) as replica:
        texts = _texts(request, before, replica)
        told = f"perplexity of {texts.num_scored} tokens of {texts.told}; speeds are medians of rounds in turns"
        tell(Caption(text=f"{told}, {texts.num_new} new tokens after {len(texts.prompts[0])}, {num_threads} threads"))
        perplexity = _perplexity(replica, texts)
        after = [_beside(start, (replica, figures), source, texts, tell) for source in sources[1:]]
        if not figures.rates:
            _rounds([replica], [figures], texts)
        tell(ModelMeasured(model=asdict(_row(before, replica, figures, perplexity))))
        for row in after:
            tell(ModelMeasured(model=asdict(row)))


def _beside(
    start: Callable[[SourceModel], MeasuredReplica],
    pair: tuple[MeasuredReplica, _Figures],
    source: SourceModel,
    texts: _Texts,
    tell: Tell,
) -> MeasuredModel:
    tell(WorkProgress(text=f"{source.name} is measured"))
    figures = _Figures()
    try:
        with start(source) as replica:
            perplexity = _perplexity(replica, texts)
            _rounds([pair[0], replica], [pair[1], figures], texts)
            return _row(source, replica, figures, perplexity)
    except LLMCloudError as error:
        return MeasuredModel(source.name, source.num_bytes, problem=str(error))


def _row(source: SourceModel, replica: MeasuredReplica, figures: _Figures, perplexity: float | None) -> MeasuredModel:
    return MeasuredModel(
        source.name,
        source.num_bytes,
        perplexity,
        median(figures.rates),
        median(figures.batch_rates),
        median(figures.first_s),
        replica.peak_memory_bytes,
        str(replica.details.get("engine", "")),
    )


def _rounds(replicas: Sequence[MeasuredReplica], figures: Sequence[_Figures], texts: _Texts) -> None:
    """All of them in turns; what comes first in one round comes last in the next. The first round warms up."""
    for number in range(ROUNDS + 1):
        order = list(zip(replicas, figures, strict=True))
        for replica, found in order if number % 2 else reversed(order):
            _round(replica, found if number else _Figures(), texts, number)


def _round(replica: MeasuredReplica, figures: _Figures, texts: _Texts, number: int) -> None:
    options: dict[str, Any] = {"max_tokens": texts.num_new, "temperature": 0, "ignore_eos": True}
    prompts = _some(texts.prompts, number * (AT_ONCE + 1), AT_ONCE + 1)
    first, whole = replica.stream(prompts[0], **options)
    figures.first_s.append(first)
    figures.rates.append((texts.num_new - 1) / max(whole - first, 1e-9))
    began = time.perf_counter()
    usage = replica.complete(prompts[1:], **options)["usage"]
    figures.batch_rates.append(usage["completion_tokens"] / (time.perf_counter() - began))


def _some(prompts: Sequence[list[int]], start: int, count: int) -> list[list[int]]:
    return [prompts[(start + offset) % len(prompts)] for offset in range(count)]


def _perplexity(replica: MeasuredReplica, texts: _Texts) -> float | None:
    """Of the windows; None when the engine that serves the model cannot score a text.

    Raises ModelError where what it computes are no numbers.
    """
    total = 0.0
    for window in texts.scored:
        try:
            answer = replica.complete([window], echo=True, logprobs=0, max_tokens=0, temperature=0)
        except LLMCloudError:
            return None
        scores = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        if None in scores:  # NaN and infinity, for which JSON has no number
            raise ModelError("what it computes of the held-out text are no numbers (NaN): it is broken.")
        total += sum(scores)
    return math.exp(min(_LARGEST_LOSS, -total / texts.num_scored))


def _texts(request: MeasureRequest, before: SourceModel, replica: MeasuredReplica) -> _Texts:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(before.layout.tokenizer, local_files_only=True)
    context = int(replica.details.get("context_length", _LONGEST_WINDOW))
    if request.texts:
        texts, told = read_texts(request.texts), request.told
    else:
        texts, told = _written(replica, tokenizer, context), f"text that {before.name} has written itself"
    scored = [
        row for row in windows(texts, tokenizer, min(_LONGEST_WINDOW, context - 1), _SCORED_TOKENS) if len(row) > 1
    ]
    if not scored:
        raise UsageError(f"{told} has no two tokens: perplexity cannot be measured. Give a longer text.")
    length = min(PROMPT_TOKENS, context // 4)
    return _Texts(scored, _prompts(scored, length), min(NEW_TOKENS, context - length - 1), told)


def _prompts(scored: Sequence[list[int]], length: int) -> list[list[int]]:
    """Pieces of the texts, as many as all rounds need where there are so many."""
    wanted = (ROUNDS + 1) * (AT_ONCE + 1)
    tokens = [token for window in scored for token in window]
    step = max(1, (len(tokens) - length) // wanted)
    return [tokens[place : place + length] for place in range(0, max(1, len(tokens) - length), step)][:wanted]


def _written(replica: MeasuredReplica, tokenizer: Any, context: int) -> list[str]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id or 0
    length = min(_LONGEST_WRITTEN, context - 2)
    answers = [
        replica.complete([[start]], max_tokens=length, temperature=1, seed=seed)["choices"][0]["text"]
        for seed in range(_WRITTEN)
    ]
    return [text for text in answers if text.strip()] or [tokenizer.decode([start] * 8)]
