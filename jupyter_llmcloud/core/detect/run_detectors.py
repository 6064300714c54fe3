"""The detectors of one run, and what is to be done about what they find.

Policies, by detector: `note` (the default) writes the alert down and shows it, `stop` also stops the run as the Stop
button does, `off` says nothing. `skip`, for gradients that are not finite, leaves their step out, on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.detect.growth import GrowthDetector, Level
from jupyter_llmcloud.core.detect.spikes import GRADIENT_Z, LOSS_Z, SpikeDetector, Value
from jupyter_llmcloud.core.detect.waits import DataBoundDetector, Shares, StragglerDetector
from jupyter_llmcloud.core.metrics.values import StepCount, as_number
from jupyter_llmcloud.core.names import short_name
from jupyter_llmcloud.core.run.time_split import Split
from jupyter_llmcloud.errors import UsageError

DETECTORS = ("not-finite", "loss-spike", "gradient-spike", "straggler", "data-bound", "memory-leak", "disk-full")
POLICIES = ("note", "stop", "off")
SKIP = "skip"  # of not-finite alone: ranks themselves do it, before the step
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
        allowed = (*POLICIES, SKIP) if name == "not-finite" else POLICIES
        if not equals or policy not in allowed:
            raise UsageError(f"expected {name}= with one of {', '.join(allowed)}, not {word.strip()!r}")
        if found.setdefault(name, policy) != policy:
            raise UsageError(f"{name} is given twice: {found[name]} and {policy}")
    return found


class RunDetectors:
    """Feeds the detectors of one run with what is seen of it.

    Args:
        chosen: policies as `--watch` has them; "" for the defaults.
    """

    def __init__(self, chosen: str = "") -> None:
        self._policies = policies(chosen) if chosen else {}
        self._spikes: dict[str, tuple[int, SpikeDetector]] = {}  # with the rank whose values are looked at
        self._steps: dict[int, StepCount] = {}
        self._straggler = StragglerDetector()
        self._data_bound = DataBoundDetector()
        self._memory: dict[int, GrowthDetector] = {}
        self._disk = GrowthDetector("disk-full", "the disk of the run's folder", "size of the disk")
        self._counts: dict[str, int] = {}

    def policy(self, detector: str) -> str:
        """What is to be done about an alert of this detector."""
        return self._policies.get(detector, "note")

    def metrics(self, rank: int, records: Iterable[Mapping[str, Any]]) -> list[Alert]:
        """What a rank has logged: losses and gradient norms of training that jump."""
        alerts = []
        for record in records:
            if not (values := record.get("values")):
                continue
            step = self._steps.setdefault(rank, StepCount()).of(record)
            for name, value in values.items():
                number = as_number(value)
                if number is None or (detector := self._spike_detector(name, rank)) is None:
                    continue
                detector.feed(Value(step, number))
                alerts.append(detector.check())
        return self._wanted(alerts)

    def _spike_detector(self, name: str, rank: int) -> SpikeDetector | None:
        """One for each metric, of the first rank that logs it: the ranks' losses jump together."""
        if name in self._spikes:
            first, detector = self._spikes[name]
            return detector if first == rank else None
        if len(self._spikes) >= MAX_METRICS or _EVALUATION.search(name):
            return None
        if _LOSS.search(name):
            detector = SpikeDetector("loss-spike", short_name(name), LOSS_Z)
        elif _GRADIENT.search(name):
            detector = SpikeDetector("gradient-spike", short_name(name), GRADIENT_Z)
        else:
            return None
        self._spikes[name] = (rank, detector)
        return detector

    def shares(self, now: float, shares: Mapping[int, Split]) -> list[Alert]:
        """How the ranks have spent their last seconds."""
        observation = Shares(now, shares)
        self._straggler.feed(observation)
        self._data_bound.feed(observation)
        return self._wanted([self._straggler.check(), self._data_bound.check()])

    def memory(self, now: float, rank: int, resident: int, available: int) -> list[Alert]:
        """Bytes that a rank has resident, and that its host or container has left for it; 0 where it cannot be told."""
        if not resident or not available:
            return []
        name = f"the memory of rank {rank}"
        detector = self._memory.get(rank)
        if detector is None:
            detector = self._memory[rank] = GrowthDetector("memory-leak", name, "memory that it can have", (rank,))
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

    def _wanted(self, alerts: Iterable[Alert | None]) -> list[Alert]:
        found = []
        for alert in alerts:
            if alert is None or self.policy(alert.detector) == "off":
                continue
            self._counts[alert.detector] = self._counts.get(alert.detector, 0) + 1
            if self._counts[alert.detector] <= MAX_ALERTS:
                found.append(alert)
        return found
