"""The detectors of one run, and what is to be done about what they find.

Policies, by detector: `note` (the default) writes the alert down and shows it, `stop` also stops the run as the Stop
button does, `off` says nothing. `skip`, for gradients that are not finite, leaves their step out, on every rank.
`rollback`, for losses and gradient norms, has the run go back to its last good checkpoint (see rollback). `scale`, for
stragglers, has an elastic run go on without the host of the slow rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.detect.finite import FiniteDetector
from jupyter_llmcloud.core.detect.growth import GrowthDetector, Level
from jupyter_llmcloud.core.detect.spikes import GRADIENT_Z, LOSS_Z, SpikeDetector, Value
from jupyter_llmcloud.core.detect.waits import DataBoundDetector, Shares, StragglerDetector
from jupyter_llmcloud.core.metrics.values import StepCount, as_number
from jupyter_llmcloud.core.names import short_name
from jupyter_llmcloud.core.run.time_split import Split
from jupyter_llmcloud.errors import UsageError

DETECTORS = (
    "not-finite", "loss-spike", "gradient-spike", "hang", "straggler", "data-bound", "memory-leak", "disk-full",
)  # fmt: skip
POLICIES = ("note", "stop", "off")
SKIP = "skip"  # of not-finite alone: ranks themselves do it, before the step
ROLLBACK = "rollback"
SCALE = "scale"  # an elastic run goes on without the host of a slow rank
_MORE_POLICIES = {
    "not-finite": (SKIP, ROLLBACK),
    "loss-spike": (ROLLBACK,),
    "gradient-spike": (ROLLBACK,),
    "straggler": (SCALE,),
}
MAX_METRICS = 20  # with a spike detector each
MAX_ALERTS = 20  # of one detector in one run; what follows says nothing new

_LOSS = re.compile(r"(^|[/_.\s])loss$", re.IGNORECASE)
_GRADIENT = re.compile(r"(^|[/_.\s])grad(ient)?[_\s]?norm$", re.IGNORECASE)
_EVALUATION = re.compile(r"(^|[/_.\s])(eval|valid|val|validation|test)([/_.\s]|$)", re.IGNORECASE)


def parse_policies(text: str) -> str:
    """`loss-spike=stop,straggler=off`, checked, as it was written. Raises UsageError."""
    policies(text)
    return text


def policies(text: str) -> dict[str, str]:
    """By detector, for those that are named. Raises UsageError that says what is allowed."""
    found: dict[str, str] = {}
    for word in text.split(","):
        name, equals, policy = word.strip().partition("=")
        if name not in DETECTORS:
            raise UsageError(f"there is no detector {name!r}. Allowed: {', '.join(DETECTORS)}")
        allowed = (*POLICIES, *_MORE_POLICIES.get(name, ()))
        if not equals or policy not in allowed:
            raise UsageError(f"expected {name}= with one of {', '.join(allowed)}, not {word.strip()!r}")
        if found.setdefault(name, policy) != policy:
            raise UsageError(f"{name} is given twice: {found[name]} and {policy}")
    return found


def is_off(chosen: str | None, detector: str) -> bool:
    """Whether nobody wants to hear of a detector."""
    return bool(chosen) and policies(chosen or "").get(detector) == "off"


def stops(chosen: str | None, detector: str) -> bool:
    """Whether an alert of a detector stops the run."""
    return bool(chosen) and policies(chosen or "").get(detector) == "stop"


def rolls_back(chosen: str | None) -> bool:
    """Whether an alert may have the run go back to a checkpoint, by policies as `--watch` has them."""
    return bool(chosen) and ROLLBACK in policies(chosen or "").values()


def leaves_out(chosen: str | None) -> bool:
    """Whether an alert may have the run go on without a host."""
    return bool(chosen) and SCALE in policies(chosen or "").values()


class RunDetectors:
    """Feeds the detectors of one run with what is seen of it.

    Args:
        chosen: policies as `--watch` has them; "" for the defaults.
    """

    def __init__(self, chosen: str = "") -> None:
        self._policies = policies(chosen) if chosen else {}
        self._series: dict[str, _Series] = {}  # by metric
        self._steps: dict[int, StepCount] = {}
        self._straggler = StragglerDetector()
        self._data_bound = DataBoundDetector()
        self._memory: dict[str, GrowthDetector] = {}
        self._disk = GrowthDetector("disk-full", "the disk of the run's folder", "size of the disk")
        self._counts: dict[str, int] = {}

    def policy(self, detector: str) -> str:
        """What is to be done about an alert of this detector."""
        return self._policies.get(detector, "note")

    def metrics(self, rank: int, records: Iterable[Mapping[str, Any]], seen_until: int = -1) -> list[Alert]:
        """What a rank has logged: losses and gradient norms of training that jump.

        What was logged when no more than `seen_until` optimizer steps were finished was seen before.
        """
        alerts = []
        for record in records:
            if not (values := record.get("values")):
                continue
            step, at = self._steps.setdefault(rank, StepCount()).of(record), record.get("at")
            if at is not None and at <= seen_until:
                continue
            for name, value in values.items():
                number = as_number(value)
                if number is not None and (series := self._series_of(name, rank)) is not None:
                    alerts += series.look(Value(step, number), at)
        return self._wanted(alerts)

    def _series_of(self, name: str, rank: int) -> _Series | None:
        """One for each metric, of the first rank that logs it: the ranks' losses jump together."""
        if name in self._series:
            series = self._series[name]
            series.rank = rank if series.rank is None else series.rank
            return series if series.rank == rank else None
        if len(self._series) >= MAX_METRICS or _EVALUATION.search(name):
            return None
        if _LOSS.search(name):
            detectors: list[SpikeDetector | FiniteDetector] = [SpikeDetector("loss-spike", short_name(name), LOSS_Z)]
            if self.policy("not-finite") == ROLLBACK:
                detectors.append(FiniteDetector(short_name(name)))
        elif _GRADIENT.search(name):
            detectors = [SpikeDetector("gradient-spike", short_name(name), GRADIENT_Z)]
        else:
            return None
        series = self._series[name] = _Series(rank, detectors)
        return series

    @property
    def good_step(self) -> int | None:
        """Optimizer steps that were finished when every metric was good; None where no run is to go back there."""
        if ROLLBACK not in self._policies.values():
            return None
        return min((series.good for series in self._series.values()), default=None)

    def shares(self, now: float, shares: Mapping[int, Split]) -> list[Alert]:
        """How the ranks have spent their last seconds."""
        observation = Shares(now, shares)
        self._straggler.feed(observation)
        self._data_bound.feed(observation)
        return self._wanted([self._straggler.check(), self._data_bound.check()])

    def memory(self, now: float, rank: int, resident: int, available: int, on: str = "") -> list[Alert]:
        """Bytes that a rank has, and that its host, container or GPU has left for it; 0 where it cannot be told."""
        if not resident or not available:
            return []
        name = f"the memory of rank {rank}{on}"
        detector = self._memory.get(name)
        if detector is None:
            detector = self._memory[name] = GrowthDetector("memory-leak", name, "memory that it can have", (rank,))
        detector.feed(Level(now, resident, resident + available))
        return self._wanted([detector.check()])

    def disk(self, now: float, used: int, total: int) -> list[Alert]:
        """Bytes of the file system that holds the run's folder."""
        self._disk.feed(Level(now, used, total))
        return self._wanted([self._disk.check()])

    def begin_attempt(self) -> None:
        """The ranks are begun anew: their memory and their waits are not what they were."""
        self._memory.clear()
        self._straggler, self._data_bound = StragglerDetector(), DataBoundDetector()
        self.let_go(None)
        for series in self._series.values() if ROLLBACK in self._policies.values() else ():
            series.begin_again()

    def let_go(self, rank: int | None) -> None:
        """A rank logs no more, or (None) any may be gone or have another number: what it was heard for, others tell."""
        for series in self._series.values():
            series.rank = None if rank in (None, series.rank) else series.rank

    def _wanted(self, alerts: Iterable[Alert | None]) -> list[Alert]:
        found = []
        for alert in alerts:
            if alert is None or self.policy(alert.detector) == "off":
                continue
            self._counts[alert.detector] = self._counts.get(alert.detector, 0) + 1
            if self._counts[alert.detector] <= MAX_ALERTS or self.policy(alert.detector) == ROLLBACK:
                found.append(alert)
        return found


class _Series:
    """One metric, of one rank at a time, and what looks at it.

    Attributes:
        rank: whose values are looked at; None: of whoever logs it next.
        good: optimizer steps that were finished at its last value that nobody minds.
    """

    def __init__(self, rank: int, detectors: list[SpikeDetector | FiniteDetector]) -> None:
        self.rank: int | None = rank
        self.good = 0
        self._detectors = detectors

    def look(self, value: Value, at: int | None) -> list[Alert | None]:
        """The next value, which was logged when `at` optimizer steps were finished, where that is known."""
        found: list[Alert | None] = []
        for detector in self._detectors:
            detector.feed(value)
            found.append(detector.check())
        if at is None:
            return found
        if not any(detector.is_flagged for detector in self._detectors):
            self.good = at
        return [replace(alert, between=(self.good, at)) for alert in found if alert is not None]

    def begin_again(self) -> None:
        """The ranks are begun anew, perhaps from before what was told."""
        for detector in self._detectors:
            detector.begin_again()
