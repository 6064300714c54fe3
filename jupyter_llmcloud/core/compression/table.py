"""What was measured of a model before and after, and what that says of a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOISE = 0.05  # medians that are closer than this are told as alike


@dataclass(frozen=True)
class MeasuredModel:
    """One model, as its endpoint serves it. None: it could not be measured.

    Attributes:
        name: of the model.
        num_bytes: of its weights on disk.
        perplexity: of the held-out text.
        tokens_per_s: of one sequence; the median.
        batch_tokens_per_s: of several sequences at once; the median.
        first_token_s: from the request to the first token; the median.
        memory_bytes: the most that its process has held.
        engine: what generates its tokens.
        problem: why it was not measured.
    """

    name: str
    num_bytes: int = 0
    perplexity: float | None = None
    tokens_per_s: float | None = None
    batch_tokens_per_s: float | None = None
    first_token_s: float | None = None
    memory_bytes: int | None = None
    engine: str = ""
    problem: str = ""


HEADINGS = (
    "model", "on disk", "perplexity", "tokens/s", "tokens/s, {batch} at once", "first token", "peak memory", "engine",
    "verdict",
)  # fmt: skip


def headings(num_at_once: int) -> list[str]:
    """Those of the table."""
    return [heading.format(batch=num_at_once) for heading in HEADINGS]


def rows(before: MeasuredModel, after: Sequence[MeasuredModel], bound_percent: float) -> list[list[str]]:
    """The table: the model as it was, then each that was made of it, with what each is good for."""
    return [
        _row(before, "as it was" if not before.problem else before.problem),
        *(_row(one, verdict(before, one, bound_percent)) for one in after),
    ]


def verdict(before: MeasuredModel, after: MeasuredModel, bound_percent: float) -> str:
    """Whether a method helps, in words: what is better, what is worse, and whether perplexity is within its bound."""
    if after.problem:
        return f"not measured: {after.problem}"
    better: list[str] = []
    worse: list[str] = []
    for word, ratio, is_good in _ratios(before, after):
        (better if is_good else worse).append(f"{word} ({ratio})")
    rise = _rise(before, after)
    if rise is not None and not rise <= bound_percent:  # also where it is no number
        worse.append(f"perplexity +{rise:.3g} %, and +{bound_percent:g} % is the bound")
        return f"does not help: {', '.join(worse)}" + (f"; {', '.join(better)}" if better else "")
    if rise is not None and rise < -100 * NOISE:  # distilled, or fine-tuned before it was merged
        better.insert(0, f"perplexity {rise:.3g} %")
    if not better:
        return "does not help" + (f": {', '.join(worse)}" if worse else ": nothing is smaller or faster")
    return ", ".join(better) + (f", but {', '.join(worse)}" if worse else "")


def _ratios(before: MeasuredModel, after: MeasuredModel) -> list[tuple[str, str, bool]]:
    """(word, ratio, whether that is good) of what has changed by more than noise."""
    compared = (
        ("smaller on disk", "larger on disk", before.num_bytes, after.num_bytes, False),
        ("faster", "slower", before.tokens_per_s, after.tokens_per_s, True),
        ("faster in batches", "slower in batches", before.batch_tokens_per_s, after.batch_tokens_per_s, True),
        ("sooner", "later", before.first_token_s, after.first_token_s, False),
        ("less memory", "more memory", before.memory_bytes, after.memory_bytes, False),
    )
    found = []
    for good, bad, was, now, more_is_better in compared:
        if was and now and abs(now / was - 1) > NOISE:
            is_good = (now > was) == more_is_better
            found.append((good if is_good else bad, f"{now / was:.2g} x", is_good))
    return found


def _rise(before: MeasuredModel, after: MeasuredModel) -> float | None:
    if not before.perplexity or not after.perplexity:
        return None
    return (after.perplexity / before.perplexity - 1) * 100


def _row(one: MeasuredModel, said: str) -> list[str]:
    return [
        one.name,
        size(one.num_bytes),
        "" if one.perplexity is None else f"{one.perplexity:.4g}",
        "" if one.tokens_per_s is None else f"{one.tokens_per_s:.0f}",
        "" if one.batch_tokens_per_s is None else f"{one.batch_tokens_per_s:.0f}",
        "" if one.first_token_s is None else f"{one.first_token_s * 1000:.1f} ms",
        "" if one.memory_bytes is None else size(one.memory_bytes),
        one.engine,
        said,
    ]


def size(num_bytes: int) -> str:
    """`3.5 MB`, `1.2 GB`."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
