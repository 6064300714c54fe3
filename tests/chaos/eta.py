"""The time that is left, with its interval, over runs whose steps take what they take: is the truth within it?

Thirty runs of six kinds, from seeds that were used for nothing else: even steps, steps that are alike in a row,
evaluations and checkpoints between them, faults that cost a restart, a slow drift, and a pace that changes for good at
a moment nobody can foresee. It holds when at 25, 50 and 75 % at least MIN_COVERAGE of the intervals hold the truth, and
the middle is no worse than elapsed time by progress.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable

from jupyter_llmcloud.core.metrics.eta import StepDurations

SEEDS = range(7000, 7030)
MARKS = (0.10, 0.25, 0.50, 0.75)
MIN_COVERAGE = 0.7  # of an interval for 80 %, over 30 runs
NUM_STEPS = 2000


def _even(random_: random.Random, _step: int, _state: dict[str, float]) -> float:
    return random_.lognormvariate(0, 0.2)


def _alike(random_: random.Random, _step: int, state: dict[str, float]) -> float:
    state["level"] = 0.97 * state.get("level", 0.0) + random_.gauss(0, 0.05)
    return random_.lognormvariate(state["level"], 0.1)


def _evaluations(random_: random.Random, step: int, _state: dict[str, float]) -> float:
    return random_.lognormvariate(0, 0.2) + (60 if step % 150 == 149 else 0) + (8 if step % 40 == 39 else 0)


def _faults(random_: random.Random, _step: int, _state: dict[str, float]) -> float:
    return random_.lognormvariate(0, 0.3) + (random_.uniform(20, 60) if random_.random() < 1 / 120 else 0)


def _drift(random_: random.Random, step: int, state: dict[str, float]) -> float:
    slope = state.setdefault("slope", random_.uniform(-0.2, 0.3))
    return random_.lognormvariate(0, 0.2) * (1 + slope * step / NUM_STEPS)


def _change(random_: random.Random, step: int, state: dict[str, float]) -> float:
    at = state.setdefault("at", random_.uniform(0.1, 0.45) * NUM_STEPS)
    factor = state.setdefault("factor", random_.choice((0.5, 2.0)))
    return random_.lognormvariate(0, 0.2) * (factor if step >= at else 1)


KINDS: tuple[Callable[[random.Random, int, dict[str, float]], float], ...] = (
    _even, _alike, _evaluations, _faults, _drift, _change,
)  # fmt: skip


def main() -> bool:
    """Print the coverage and the errors at each mark."""
    covered: dict[float, list[bool]] = defaultdict(list)
    ours: dict[float, list[float]] = defaultdict(list)
    plain: dict[float, list[float]] = defaultdict(list)
    width: dict[float, list[float]] = defaultdict(list)
    for seed in SEEDS:
        random_, state = random.Random(seed), dict[str, float]()
        kind = KINDS[seed % len(KINDS)]
        steps = [kind(random_, step, state) for step in range(NUM_STEPS)]
        times, at = StepDurations(), 0
        for mark in MARKS:
            while at < mark * NUM_STEPS:
                times.add(1, steps[at])
                at += 1
            found, truth = times.left(NUM_STEPS - at), sum(steps[at:])
            assert found is not None
            covered[mark].append(found.low <= truth <= found.high)
            ours[mark].append(abs(found.middle - truth) / truth)
            plain[mark].append(abs(sum(steps[:at]) / at * (NUM_STEPS - at) - truth) / truth)
            width[mark].append((found.high - found.low) / truth)
    for mark in MARKS:
        print(f"eta at {mark:.0%}: truth within the interval {statistics.mean(covered[mark]):.2f}, ", end="")
        print(f"error median {statistics.median(ours[mark]):.3f} mean {statistics.mean(ours[mark]):.3f}, ", end="")
        print(
            f"of elapsed by progress {statistics.median(plain[mark]):.3f} and {statistics.mean(plain[mark]):.3f}, ",
            end="",
        )
        print(f"width {statistics.median(width[mark]):.3f} of the truth")
    return all(statistics.mean(covered[mark]) >= MIN_COVERAGE for mark in MARKS[1:]) and all(
        statistics.mean(ours[mark]) <= statistics.mean(plain[mark]) * 1.05 for mark in MARKS[1:]
    )
