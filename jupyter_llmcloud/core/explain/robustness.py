"""How a model stands inputs that are changed, and what it says of such as it was not made for: figures and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CERTAIN = 0.01  # a difference that chance makes as often is not called one; a table asks several times
SURE = 0.9  # a probability from which an answer is called sure


@dataclass(frozen=True)
class TriedInputs:
    """The data, changed in one way.

    Attributes:
        change: in words; the first row of a table is the data as they are.
        num_rows: how many were asked.
        num_right: of a classifier: how many answers are right; None where nobody knows.
        num_lost: right before, and wrong now.
        num_won: wrong before, and right now.
        num_other: another answer than to the row as it is; of a generator, another next token.
        perplexity: of a generator.
        num_worse, num_better: of a generator: rows whose unchanged half is less (more) likely than before.
    """

    change: str
    num_rows: int
    num_right: int | None = None
    num_lost: int = 0
    num_won: int = 0
    num_other: int = 0
    perplexity: float | None = None
    num_worse: int = 0
    num_better: int = 0


@dataclass(frozen=True)
class OutsideInputs:
    """Inputs of another kind than the data.

    Attributes:
        what: they are.
        confidence: of a classifier: the mean probability of its answers.
        num_sure: answers with a probability of at least `SURE`.
        separation: how often an answer to the data is surer than one to these: 0.5 tells nothing, 1 tells them apart.
        bits_per_byte: of a generator: how unlikely it finds them.
    """

    what: str
    num_rows: int
    confidence: float | None = None
    num_sure: int = 0
    separation: float | None = None
    bits_per_byte: float | None = None


def compared(
    change: str, answers: Sequence[int], before: Sequence[int], labels: Sequence[int | None] | None
) -> TriedInputs:
    """Answers to changed rows beside those to the rows as they are."""
    other = sum(now != was for now, was in zip(answers, before, strict=True))
    if labels is None:
        return TriedInputs(change, len(answers), num_other=other)
    rows = list(zip(answers, before, labels, strict=True))
    return TriedInputs(
        change,
        len(rows),
        sum(now == label for now, _, label in rows),
        sum(was == label != now for now, was, label in rows),
        sum(now == label != was for now, was, label in rows),
        other,
    )


def sign_test(fewer: int, more: int) -> float:
    """How often chance makes a difference that is so one-sided, of `fewer` and `more` cases: two-sided, exact."""
    count = fewer + more
    if not count:
        return 1.0
    tail = sum(math.comb(count, number) for number in range(min(fewer, more) + 1))
    share: float = 2 * tail / 2**count
    return min(1.0, share)


def interval(count: int, of: int) -> tuple[float, float]:
    """Where a share lies in nineteen of twenty cases, by Wilson."""
    if not of:
        return 0.0, 1.0
    z, share = 1.959964, count / of
    middle = share + z * z / (2 * of)
    spread = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, (middle - spread) / (1 + z * z / of)), min(1.0, (middle + spread) / (1 + z * z / of))


def separation(inside: Sequence[float], outside: Sequence[float]) -> float | None:
    """How often one of `inside` is larger than one of `outside`; a tie counts half."""
    if not inside or not outside:
        return None
    larger = sum((one > other) + 0.5 * (one == other) for one in inside for other in outside)
    return larger / (len(inside) * len(outside))


def verdict(row: TriedInputs) -> str:
    """What a change does, in words."""
    if row.perplexity is not None:
        if sign_test(row.num_better, row.num_worse) >= CERTAIN:
            return "no difference beyond chance"
        return "harder to go on from" if row.num_worse > row.num_better else "easier to go on from"
    if row.num_right is None:
        return f"{row.num_other / row.num_rows:.0%} other answers" if row.num_other else "the same answers"
    if sign_test(row.num_won, row.num_lost) >= CERTAIN:
        return "no difference beyond chance" if row.num_other else "the same answers"
    points = 100 * (row.num_lost - row.num_won) / row.num_rows
    return f"loses {points:.3g} points" if points > 0 else f"gains {-points:.3g} points"


def headings(rows: Sequence[TriedInputs]) -> list[str]:
    """Of the table."""
    if rows[0].perplexity is not None:
        return ["texts", "perplexity of their second half", "other next token", "verdict"]
    if rows[0].num_right is None:
        return ["rows", "other answers", "verdict"]
    return ["rows", "right", "between", "other answers", "verdict"]


def table(rows: Sequence[TriedInputs]) -> list[list[str]]:
    """The data as they are, then each change, with a verdict."""
    return [_row(row, "as they are" if number == 0 else verdict(row)) for number, row in enumerate(rows)]


def _row(row: TriedInputs, said: str) -> list[str]:
    other = f"{row.num_other / row.num_rows:.1%}"
    if row.perplexity is not None:
        return [row.change, f"{row.perplexity:.4g}", other, said]
    if row.num_right is None:
        return [row.change, other, said]
    low, high = interval(row.num_right, row.num_rows)
    return [row.change, f"{row.num_right / row.num_rows:.1%}", f"{low:.0%} to {high:.0%}", other, said]


def outside_headings(rows: Sequence[OutsideInputs]) -> list[str]:
    """Of the table of inputs of another kind."""
    if rows[0].bits_per_byte is not None:
        return ["texts of another kind", "bits per byte", "verdict"]
    return ["of another kind", "mean probability", f"sure ({SURE:.0%})", "told apart", "verdict"]


def outside_table(rows: Sequence[OutsideInputs]) -> list[list[str]]:
    """The data first, then what is of another kind."""
    return [_outside_row(row, rows[0], number == 0) for number, row in enumerate(rows)]


def _outside_row(row: OutsideInputs, inside: OutsideInputs, is_inside: bool) -> list[str]:
    if row.bits_per_byte is not None:
        ratio = row.bits_per_byte / inside.bits_per_byte if inside.bits_per_byte else 1.0
        return [row.what, f"{row.bits_per_byte:.3g}", "the data" if is_inside else f"{ratio:.2g} x as unlikely"]
    told = "" if row.separation is None else f"{row.separation:.2f}"
    return [
        row.what,
        f"{row.confidence or 0:.2f}",
        f"{row.num_sure / row.num_rows:.0%}",
        told,
        "the data" if is_inside else _told_apart(row),
    ]


def _told_apart(row: OutsideInputs) -> str:
    if row.separation is None or row.separation < 0.7:
        return "answered as surely as the data: its probabilities do not warn"
    return "less sure than of the data" if row.separation < 0.9 else "clearly less sure than of the data"


def worst(rows: Sequence[Sequence[int]], labels: Sequence[int | None] | None) -> TriedInputs | None:
    """Rows that are right as they are and under every change; None where nobody knows what is right."""
    if labels is None or not rows:
        return None
    stands = [all(answer == label for answer in answers) for *answers, label in zip(*rows, labels, strict=True)]
    before = [answer == label for answer, label in zip(rows[0], labels, strict=True)]
    lost = sum(was and not now for was, now in zip(before, stands, strict=True))
    other = sum(len(set(answers)) > 1 for answers in zip(*rows, strict=True))
    return TriedInputs("the worst of them for each row", len(stands), sum(stands), lost, 0, other)
