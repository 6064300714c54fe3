"""Population-based training as rules: from whose state a trial goes on, and with which values.

A sweep's trials are turns: turn n is that of member n % size in generation n // size. After a generation the worst
part of the members takes over state and values of the best part, and moves the values; the others go on from their own
(Jaderberg et al. 2017, truncation selection).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.search.choices import read_pruner
from jupyter_llmcloud.errors import UsageError

PBT = "pbt"
DEFAULT_SIZE = 5
DEFAULT_SHARE = 25  # percent of the members that take over, and of those that are taken over
DEFAULT_RESAMPLE = 25  # percent of the values that are drawn anew; the others are moved
FACTORS = (0.8, 1.25)  # of a value on a logarithmic range
PART_OF_RANGE = 0.1  # by which one on any other range is moved


@dataclass(frozen=True)
class Population:
    """How many members there are, and what happens between their generations."""

    size: int = DEFAULT_SIZE
    share: int = DEFAULT_SHARE
    resample: int = DEFAULT_RESAMPLE

    def generation(self, number: int) -> int:
        """Of a trial, from 0."""
        return number // self.size

    @property
    def num_replaced(self) -> int:
        """Members of a generation that go on from another one's state."""
        return min(self.size // 2, max(1, round(self.size * self.share / 100)))


def read_population(prune: str) -> Population | None:
    """Of a sweep by `--prune pbt,...`; None of any other."""
    choice = read_pruner(prune)
    if choice.name != PBT:
        return None
    given = {"population": DEFAULT_SIZE, "share": DEFAULT_SHARE, "resample": DEFAULT_RESAMPLE, **choice.settings}
    return Population(given["population"], given["share"], given["resample"])


def check_population(prune: str, sampler: str, num_trials: int) -> None:
    """Raise UsageError for options that do not go together."""
    if (population := read_population(prune)) is None:
        return
    if population.share > 50 or population.resample > 100:
        raise UsageError(f"--prune {prune}: share is at most 50 and resample at most 100, in percent.")
    if sampler in ("grid", "cmaes"):
        raise UsageError(
            f"--sampler {sampler} does not go with --prune {PBT}: only the first generation is proposed by a sampler. "
            "Take random or tpe."
        )
    if num_trials < 2 * population.size:
        raise UsageError(
            f"--trials {num_trials} is less than two generations of {population.size}: a trial is the turn of one "
            f"member in one generation. Give --trials {2 * population.size} or more, or --prune {PBT},population=N."
        )


# --- whose state ---


@dataclass(frozen=True)
class Turn:
    """A trial that has ended; without a value it has failed, or left no state."""

    number: int
    value: float | None


@dataclass(frozen=True)
class Origin:
    """The trial from whose state one goes on; `moves`: the values are changed, for another member has taken it over."""

    parent: int
    moves: bool


def origin(
    number: int, turns: Sequence[Turn], population: Population, maximize: bool, draw: random.Random
) -> Origin | None:
    """Where a trial goes on, by the turns before its generation; None where it begins anew.

    What counts is the newest generation of which any turn is done. Turns that failed are worse than all others.
    """
    done = [turn for turn in turns if turn.value is not None]
    generation = population.generation(number)
    newest = max((population.generation(turn.number) for turn in done), default=-1)
    if generation == 0 or newest < 0 or newest >= generation:
        return None
    sign = -1 if maximize else 1
    ranked = sorted(
        (turn for turn in done if population.generation(turn.number) == newest),
        key=lambda turn: (sign * (turn.value or 0.0), turn.number),
    )
    own = newest * population.size + number % population.size
    num_failed = population.size - len(ranked)
    is_failed = all(turn.number != own for turn in ranked)
    num_worst = min(max(0, population.num_replaced - num_failed), len(ranked) // 2)
    worst = {turn.number for turn in ranked[len(ranked) - num_worst :]}
    if not is_failed and own not in worst:
        return Origin(own, moves=False)
    best = ranked[: max(1, min(population.num_replaced, len(ranked) - num_worst))]
    return Origin(draw.choice(best).number, moves=True)


# --- which values ---


@dataclass(frozen=True)
class NumberRange:
    """The range of a number; `step` of one that has values in between only at multiples."""

    low: float
    high: float
    step: float | None = None
    is_log: bool = False
    is_whole: bool = False


@dataclass(frozen=True)
class ChoiceRange:
    """The values of a choice."""

    choices: tuple[Any, ...]


def moved(
    values: Mapping[str, Any],
    ranges: Mapping[str, NumberRange | ChoiceRange],
    resample: int,
    draw: random.Random,
) -> dict[str, Any]:
    """Values near those of the parent: each is drawn anew with `resample` percent, else moved a little.

    A choice, which has no neighbours, is drawn anew or stays. What is in no range stays as it is.
    """
    found = dict(values)
    for name, space in ranges.items():
        value, is_new = values[name], draw.random() * 100 < resample
        if isinstance(space, ChoiceRange):
            found[name] = draw.choice(space.choices) if is_new else value
        else:
            found[name] = _on_grid(
                _drawn(space, draw) if is_new else _stepped(value, space, draw), value, space, is_new
            )
    return found


def _drawn(space: NumberRange, draw: random.Random) -> float:
    if space.is_log:
        low = space.low - 0.5 if space.is_whole else space.low
        high = space.high + 0.5 if space.is_whole else space.high
        return float(max(low, 1e-300) * (high / max(low, 1e-300)) ** draw.random())
    return draw.uniform(space.low, space.high)


def _stepped(value: float, space: NumberRange, draw: random.Random) -> float:
    upward = draw.random() < 0.5
    if space.is_log:
        return value * FACTORS[upward]
    return value + (space.high - space.low) * PART_OF_RANGE * (1 if upward else -1)


def _on_grid(value: float, before: float, space: NumberRange, is_new: bool) -> float:
    """The nearest value that the range has; one that is moved moves by a step at least, unless it is at an end."""
    step = space.step or (1 if space.is_whole else None)
    if step is None:
        return min(space.high, max(space.low, value))
    last = math.floor((space.high - space.low) / step + 1e-9)
    at, was = round((value - space.low) / step), round((before - space.low) / step)
    if not is_new and at == was:
        at += 1 if value > before else -1
    found = space.low + min(last, max(0, at)) * step
    return round(found) if space.is_whole else found
