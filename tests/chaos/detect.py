"""Each detector on simulated series with injected faults: precision, recall, delay, and false alarms where nothing is wrong.

A fault of growth (memory-leak, disk-full) is what the detector is defined by: at its true rate the limit comes within
HORIZON_S. Slower growth, up to EARLY times the horizon, may be told and need not be, as the rate has to be estimated;
an alert before that is a false one. A series has a fault when that was so for MIN_WINDOW_S, which the detector looks at
at least; the line says of how many series recall is. Nothing here goes through ranks: tests/agent/runs/test_alerts does.

The thresholds in core.detect were fixed before; the seeds here were used for nothing else. It holds when each detector
has a precision of at least MIN_PRECISION and a recall of at least MIN_RECALL, and alarms in at most MAX_FALSE_RUNS of
the runs without a fault.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from jupyter_llmcloud.core.detect.detector import Detector
from jupyter_llmcloud.core.detect.endpoint_detectors import (
    AnsweredRequest,
    ErrorDetector,
    LatencyDetector,
    PromptDriftDetector,
)
from jupyter_llmcloud.core.detect.growth import HORIZON_S, MIN_WINDOW_S, GrowthDetector, Level
from jupyter_llmcloud.core.detect.hang_detector import HangDetector, Heard, Moment
from jupyter_llmcloud.core.detect.spikes import GRADIENT_Z, LOSS_Z, SpikeDetector, Value
from jupyter_llmcloud.core.detect.waits import DataBoundDetector, Shares, StragglerDetector
from jupyter_llmcloud.core.metrics.not_finite import NotFiniteLog
from jupyter_llmcloud.core.run.hang import FLOOR_S, PATIENCE, GroupState, Sample

SEEDS = range(9000, 9100)
GIB = 2**30
EARLY = 1.5  # times HORIZON_S
MIN_PRECISION = 0.9
MIN_RECALL = 0.9
MAX_FALSE_RUNS = 0.05

# (there is a fault now, it alerts); None where an alert is neither right nor wrong
Series = Callable[[random.Random, bool], Iterator[tuple[bool | None, bool]]]


def _spikes(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
    detector = SpikeDetector("loss-spike", "loss", LOSS_Z)
    noise, at = random_.uniform(0.02, 0.3), random_.randrange(200, 1900) if faulty else -1
    size = random_.uniform(8, 20) * max(noise, 0.02)
    for step in range(2000):
        level = math.log(2 + 6 * (1 + step / 50) ** -0.5) + random_.gauss(0, noise) + (size if step == at else 0)
        detector.feed(Value(step, math.exp(level)))
        yield step == at, detector.check() is not None


def _gradient_spikes(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
    """Norms drift slowly and are noisier than losses."""
    detector = SpikeDetector("gradient-spike", "grad_norm", GRADIENT_Z)
    noise, at = random_.uniform(0.1, 0.5), random_.randrange(200, 1900) if faulty else -1
    size, drift = random_.uniform(8, 20) * noise, random_.uniform(-1, 1)
    for step in range(2000):
        level = drift * step / 2000 + random_.gauss(0, noise) + (size if step == at else 0)
        detector.feed(Value(step, math.exp(level)))
        yield step == at, detector.check() is not None


def _not_finite(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
    """One of four ranks logs NaN or an infinity from some step on; healthy values go from 1e-38 to 1e38."""
    log, known = NotFiniteLog(), False
    at, bad, value = random_.randrange(10, 450), random_.randrange(4), random_.choice((math.nan, math.inf, -math.inf))
    for step in range(500):
        for rank in range(4):
            number = 10 ** random_.uniform(-38, 38) * random_.choice((-1, 1))
            number = value if faulty and rank == bad and step >= at else number
            log.take(rank, [{"step": step, "values": {"loss": number}}])
        found = log.summary().get("loss")
        yield faulty and step >= at, found is not None and not known and (not faulty or found["first"] == at)
        known = known or found is not None


def _waits(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
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


def _data(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
    detector = DataBoundDetector()
    for reading in range(300):
        has_fault = faulty and reading >= 150
        share = min(0.95, max(0.0, random_.gauss(0.5 if has_fault else 0.12, 0.08)))
        detector.feed(Shares(2.0 * reading, {r: {"data": share, "waiting": 0.0} for r in range(4)}))
        yield has_fault, detector.check() is not None


def _memory(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
    detector, rate = GrowthDetector("memory-leak", "memory", "limit"), random_.uniform(5, 60) * 2**20
    kind, tooth = random_.choice(("flat", "sawtooth", "cache")), random_.uniform(20, 200)
    for reading in range(900):
        now = 2.0 * reading
        used = 2 * GIB + random_.gauss(0, 0.01 * GIB)
        used += {"flat": 0, "sawtooth": now % tooth / tooth * GIB, "cache": 3 * GIB * (1 - math.exp(-now / 200))}[kind]
        used += rate * max(0.0, now - 120) if faulty else 0
        detector.feed(Level(now, used, 64 * GIB))
        left_s = (64 * GIB - used) / rate if faulty and now > 120 else math.inf
        yield _is_near(left_s), detector.check() is not None


def _disk(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
    """Checkpoints are written and the old ones deleted; a fault keeps them. Others write and delete beside them."""
    detector, total = GrowthDetector("disk-full", "disk", "size"), 500 * GIB
    size, every = random_.uniform(0.5, 4) * GIB, random_.randrange(3, 12)
    used, others = random_.uniform(0.2, 0.6) * total, 0.0
    for reading in range(540):
        leaks = faulty and reading >= 90
        others = 0.9 * others + random_.gauss(0, 0.05 * GIB)
        if reading % every == 0 and leaks:
            used += size
        passing = size if reading % every == 0 and not leaks else 0.0  # the old one is deleted after the new one
        left_s = (total - used) / (size / (10.0 * every)) if leaks else math.inf
        detector.feed(Level(10.0 * reading, min(total, used + passing + others), total))
        yield _is_near(left_s), detector.check() is not None


def _hang(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
    """Four ranks that step, save and evaluate alone; with a fault one stands still while the others wait for it."""
    detector = HangDetector((0, 1, 2, 3), 4, 0.0, FLOOR_S)
    bad, at, pace = random_.randrange(4), random_.randrange(60, 240), random_.uniform(0.5, 6)
    late_until, begun = 0.0, 0
    for now in range(400):
        stands = faulty and now >= at
        if now >= late_until and not stands and random_.random() < 1 / pace:
            begun += 1  # all have met in a collective
            alone_s = random_.choice((0.0, 0.0, 0.0, random_.uniform(2, 30)))  # the first rank saves or evaluates
            late_until = now + alone_s
        works = now < late_until
        for rank in range(4):
            is_late = (rank == bad and stands) or (rank == 0 and works and not stands)
            waits = (stands or works) and not is_late
            group = GroupState((0, 1, 2, 3), begun + waits, begun)
            still_s = now - (at if stands else late_until) if waits or stands else 0.0
            phase = "collective" if waits else "checkpoint" if works else "compute"
            is_working = is_late and not stands
            sample = Sample(phase, "all_reduce" if waits else "", {"": group}, begun, "cell 1, line 9", "", 0.0)
            sample = replace(sample, still_s=max(0.0, still_s), working=is_working or (not waits and not stands))
            detector.feed(Heard(rank, sample, float(now)))
        detector.feed(Moment(float(now)))
        alert = detector.check()
        yield stands, alert is not None and (not stands or alert.ranks == (bad,))


def _requests(detector: Detector[AnsweredRequest], random_: random.Random, **fault: float) -> Iterator[bool]:
    """An endpoint with bursts of load; from request 1000 on slower, failing or asked otherwise by so much."""
    usual_s, tokens, load = random_.uniform(0.05, 2), random_.uniform(20, 500), 0.0
    rate = random_.uniform(0, 0.01)
    for number in range(2000):
        has_fault = number >= 1000
        load = 0.95 * load + random_.gauss(0, 0.08)  # neighbours are alike: a busy endpoint stays so for a while
        slower = fault.get("slower", 1.0) if has_fault else 1.0
        longer = fault.get("longer", 1.0) if has_fault else 1.0
        fails = random_.random() < (fault.get("fails", rate) if has_fault else rate)
        detector.feed(
            AnsweredRequest(
                500 if fails else 200,
                first_byte_s=usual_s * slower * math.exp(load) * random_.lognormvariate(0, 0.4),
                prompt_tokens=max(1, round(tokens * longer * random_.lognormvariate(0, 0.7))),
            )
        )
        yield detector.check() is not None


def _endpoint(make: Callable[[], Detector[AnsweredRequest]], name: str, low: float, high: float) -> Series:
    def series(random_: random.Random, faulty: bool) -> Iterator[tuple[bool | None, bool]]:
        fault = {name: random_.uniform(low, high)} if faulty else {}
        for number, alerted in enumerate(_requests(make(), random_, **fault)):
            yield faulty and number >= 1000, alerted

    return series


def _is_near(left_s: float) -> bool | None:
    if left_s < HORIZON_S:
        return True
    return None if left_s < EARLY * HORIZON_S else False


@dataclass(frozen=True)
class Case:
    """A detector's series, how long one of its readings is, and how long a fault lasts at least that has to be found."""

    series: Series
    per_reading: float
    unit: str
    lasts: float = 0


CASES = {
    "not-finite": Case(_not_finite, 1, "steps"),
    "loss-spike": Case(_spikes, 1, "steps"),
    "gradient-spike": Case(_gradient_spikes, 1, "steps"),
    "hang": Case(_hang, 1, "s", 2 * PATIENCE * FLOOR_S),
    "latency": Case(_endpoint(LatencyDetector, "slower", 4, 10), 1, "requests"),
    "errors": Case(_endpoint(ErrorDetector, "fails", 0.3, 1.0), 1, "requests"),
    "prompt-drift": Case(_endpoint(PromptDriftDetector, "longer", 3, 8), 1, "requests"),
    "straggler": Case(_waits, 2, "s"),
    "data-bound": Case(_data, 2, "s"),
    "memory-leak": Case(_memory, 2, "s", MIN_WINDOW_S),
    "disk-full": Case(_disk, 10, "s", MIN_WINDOW_S),
}


@dataclass
class Score:
    """Of one detector: hits and faults are series, `wrong` alerts; runs and readings are those without a fault."""

    hits: int = 0
    faults: int = 0
    wrong: int = 0
    false_runs: int = 0
    readings: int = 0
    delay: float = math.nan

    @property
    def precision(self) -> float:
        return self.hits / (self.hits + self.wrong) if self.hits + self.wrong else 0.0

    @property
    def recall(self) -> float:
        return self.hits / self.faults if self.faults else 0.0

    @property
    def holds(self) -> bool:
        is_right = self.precision >= MIN_PRECISION and self.recall >= MIN_RECALL
        return is_right and self.false_runs <= MAX_FALSE_RUNS * len(SEEDS)


def score(case: Case, seeds: Iterable[int] = SEEDS) -> Score:
    """Of all seeds, each with a fault and without."""
    result, delays = Score(), []
    for seed in seeds:
        rows = list(case.series(random.Random(seed), True))
        began = next((at for at, (has_fault, _) in enumerate(rows) if has_fault), None)
        alerts = [at for at, (has_fault, alerted) in enumerate(rows) if alerted and has_fault is not False]
        result.wrong += sum(alerted for has_fault, alerted in rows if has_fault is False)
        if began is not None and (len(rows) - began) * case.per_reading >= case.lasts:
            result.faults += 1
            if alerts:
                result.hits += 1
                delays.append(max(0, alerts[0] - began) * case.per_reading)
        healthy = [alerted for _, alerted in case.series(random.Random(seed + 100_000), False)]
        result.false_runs += any(healthy)
        result.wrong += sum(healthy)
        result.readings += len(healthy)
    result.delay = statistics.median(delays or [math.nan])
    return result


def main(first: float = SEEDS[0]) -> bool:
    """One line a detector; `detect:73000` takes as many seeds from there on."""
    holds, seeds = True, range(int(first), int(first) + len(SEEDS))
    for name, case in CASES.items():
        found = score(case, seeds)
        holds &= found.holds
        print(
            f"{name}: precision {found.precision:.2f}, recall {found.recall:.2f} of {found.faults} faults, median delay"
            f" {found.delay:g} {case.unit}; without a fault {found.false_runs} of {len(SEEDS)} runs alarmed"
            f" ({found.readings} readings)",
            flush=True,
        )
    return holds
