"""Each detector on simulated series with injected faults: precision, recall, delay, and false alarms where nothing is wrong.

The thresholds in core.detect were fixed before; the seeds here were used for nothing else.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator

from jupyter_llmcloud.core.detect.growth import GrowthDetector, Level
from jupyter_llmcloud.core.detect.spikes import SpikeDetector, Value
from jupyter_llmcloud.core.detect.waits import DataBoundDetector, Shares, StragglerDetector

SEEDS = range(9000, 9100)
GIB = 2**30

Series = Callable[[random.Random, bool], Iterator[tuple[bool, bool]]]  # (there is a fault now, it alerts)


def _spikes(random_: random.Random, faulty: bool) -> Iterator[tuple[bool, bool]]:
    detector = SpikeDetector("loss-spike", "loss")
    noise, at = random_.uniform(0.02, 0.3), random_.randrange(200, 1900) if faulty else -1
    size = random_.uniform(8, 20) * max(noise, 0.02)
    for step in range(2000):
        level = math.log(2 + 6 * (1 + step / 50) ** -0.5) + random_.gauss(0, noise) + (size if step == at else 0)
        detector.feed(Value(step, math.exp(level)))
        yield step == at, detector.check() is not None


def _waits(random_: random.Random, faulty: bool) -> Iterator[tuple[bool, bool]]:
    detector, slow, factor = StragglerDetector(), random_.randrange(4), random_.uniform(1.5, 3)
    for reading in range(300):
        has_fault = faulty and reading >= 150
        compute = [random_.lognormvariate(0, 0.1) * (factor if has_fault and r == slow else 1) for r in range(4)]
        whole = max(compute) * 1.1
        parts = {
            r: {
                "compute": own / whole,
                "waiting": (max(compute) - own) / whole,
                "communication": 0.1 * max(compute) / whole,
                "data": 0.0,
                "checkpoint": 0.0,
            }
            for r, own in enumerate(compute)
        }
        detector.feed(Shares(2.0 * reading, parts))
        alert = detector.check()
        yield has_fault, alert is not None and (not has_fault or alert.ranks == (slow,))


def _data(random_: random.Random, faulty: bool) -> Iterator[tuple[bool, bool]]:
    detector = DataBoundDetector()
    for reading in range(300):
        has_fault = faulty and reading >= 150
        share = min(0.95, max(0.0, random_.gauss(0.5 if has_fault else 0.12, 0.08)))
        detector.feed(Shares(2.0 * reading, {r: {"data": share, "waiting": 0.0} for r in range(4)}))
        yield has_fault, detector.check() is not None


def _memory(random_: random.Random, faulty: bool) -> Iterator[tuple[bool, bool]]:
    detector, rate = GrowthDetector("memory-leak", "memory", "limit"), random_.uniform(5, 60) * 2**20
    kind, tooth = random_.choice(("flat", "sawtooth", "cache")), random_.uniform(20, 200)
    for reading in range(900):
        now = 2.0 * reading
        used = 2 * GIB + random_.gauss(0, 0.01 * GIB)
        used += {"flat": 0, "sawtooth": now % tooth / tooth * GIB, "cache": 3 * GIB * (1 - math.exp(-now / 200))}[kind]
        has_fault = faulty and reading >= 60
        used += rate * max(0.0, now - 120) if faulty else 0
        detector.feed(Level(now, used, 64 * GIB))
        yield has_fault, detector.check() is not None


CASES: dict[str, tuple[Series, float, str]] = {
    "loss-spike": (_spikes, 1, "steps"),
    "straggler": (_waits, 2, "s"),
    "data-bound": (_data, 2, "s"),
    "memory-leak": (_memory, 2, "s"),
}


def score(name: str) -> tuple[float, float, float, int, int]:
    """Precision, recall, median delay, runs with a false alarm among those without a fault, their readings."""
    series, unit, _ = CASES[name]
    hits, wrong, false_runs, readings = 0, 0, 0, 0
    delays: list[float] = []
    for seed in SEEDS:
        began: int | None = None
        found = False
        for at, (has_fault, alerts) in enumerate(series(random.Random(seed), True)):
            if has_fault and began is None:
                began = at
            if alerts and not has_fault:
                wrong += 1
            elif alerts and not found and began is not None:
                found = True
                delays.append((at - began) * unit)
        hits += found
        healthy = [alerts for _, alerts in series(random.Random(seed + 100_000), False)]
        false_runs += any(healthy)
        wrong += sum(healthy)
        readings += len(healthy)
    precision = hits / (hits + wrong) if hits + wrong else 0.0
    return precision, hits / len(SEEDS), statistics.median(delays or [math.nan]), false_runs, readings


def main() -> bool:
    """One line a detector; it holds when each has a precision and a recall of at least 0.9."""
    holds = True
    for name, (_, _, unit) in CASES.items():
        precision, recall, delay, false_runs, readings = score(name)
        holds &= precision >= 0.9 and recall >= 0.9
        print(
            f"{name}: precision {precision:.2f}, recall {recall:.2f}, median delay {delay:g} {unit}; without a fault"
            f" {false_runs} of {len(SEEDS)} runs alarmed ({readings} readings)",
            flush=True,
        )
    return holds
