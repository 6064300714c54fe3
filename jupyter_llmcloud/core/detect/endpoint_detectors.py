"""What is wrong with an endpoint, by the requests that it has answered: slow answers, errors, prompts unlike before.

Each compares the newest requests with those before them. A rule that has told something takes what is new for usual
from then on, once that has lasted for a window of its own: a change is told once, not for ever.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from jupyter_llmcloud.core.detect.detector import Alert, Detector
from jupyter_llmcloud.core.serving.drift import MAJOR, population_stability

DETECTORS = ("latency", "errors", "prompt-drift")
RECENT = 50  # requests that are compared with those before
USUAL = 500  # requests before, at most
MIN_USUAL = 200
SLOWER = 2.5  # times the usual median, and above the usual 90th percentile
ABOVE_BUSIEST = 1.5  # times the slowest stretch of as many answers before: a busy endpoint stays so for a while
OVER = 1.5  # times the usual median: below, slowness is over
CHECK_EVERY = 5  # answers: two medians are found for it
MIN_DELAY_S = 0.05  # slower by less is nobody's trouble
MIN_ERRORS = 5
SURPRISE = 6.0  # powers of ten by which so many errors are unlikely at the usual rate
LEAST_RATE = 0.01  # of errors that any endpoint may have
RECENT_PROMPTS = 200
DRIFT_EVERY = 50  # prompts: every value of two windows is counted for it
CLIENT_GONE = 499


@dataclass(frozen=True)
class AnsweredRequest:
    """A request as it ended.

    Attributes:
        status: of HTTP.
        is_whole: whether its answer came to its end.
        first_byte_s: from its coming to the first byte of its answer; None where none was sent.
        prompt_tokens: None where nobody has counted.
    """

    status: int
    is_whole: bool = True
    first_byte_s: float | None = None
    prompt_tokens: int | None = None

    @property
    def is_error(self) -> bool:
        """Whether the endpoint is to blame: not for what was refused, nor for clients that hang up."""
        return self.status >= 500 or (self.status < 400 and not self.is_whole)


class _Windows:
    """The newest values, and the usual ones before them."""

    def __init__(self, num_recent: int) -> None:
        self.recent: deque[float] = deque(maxlen=num_recent)
        self.usual: deque[float] = deque(maxlen=USUAL)

    def add(self, value: float, is_usual: bool = True) -> None:
        """`is_usual`: what leaves the newest counts as usual; not while something is wrong."""
        if len(self.recent) == self.recent.maxlen and is_usual:
            self.usual.append(self.recent[0])
        self.recent.append(value)

    @property
    def are_full(self) -> bool:
        return len(self.recent) == self.recent.maxlen and len(self.usual) >= MIN_USUAL

    def begin_again(self) -> None:
        self.recent.clear()
        self.usual.clear()


class LatencyDetector:
    """The first byte of answers comes much later than before."""

    def __init__(self) -> None:
        self._windows = _Windows(RECENT)
        self._is_slow = False
        self._lasts = 0  # requests since it was told

    def feed(self, observation: AnsweredRequest) -> None:
        """Take in the next request."""
        if observation.status < 400 and observation.first_byte_s is not None:
            self._windows.add(observation.first_byte_s, not self._is_slow)
            self._lasts += 1

    def check(self) -> Alert | None:
        """Slow answers, told when they begin."""
        recent, usual = self._windows.recent, self._windows.usual
        if not self._windows.are_full or self._lasts % CHECK_EVERY:
            return None
        now, before = median(recent), median(usual)
        if self._is_slow:
            self._is_slow = now > OVER * before and self._lasts < USUAL
            if self._lasts >= USUAL:  # what lasts is usual from now on
                self._windows.begin_again()
            return None
        slow = max(SLOWER * before, quantiles(usual, n=10)[-1], before + MIN_DELAY_S, ABOVE_BUSIEST * _busiest(usual))
        if now <= slow:
            return None
        self._is_slow, self._lasts = True, 0
        return Alert(
            "latency",
            f"answers begin after {now:.3g} s in the median, {now / before:.1f} times as late as before",
            f"the last {len(recent)} answers beside {len(usual)} before (median of seconds to the first byte)",
            now,
            slow,
        )


def _busiest(usual: Sequence[float]) -> float:
    """The greatest median of stretches of RECENT answers."""
    values = list(usual)
    return max(median(values[at : at + RECENT]) for at in range(0, len(values) - RECENT + 1, RECENT // 2))


class ErrorDetector:
    """More requests fail than usual."""

    def __init__(self) -> None:
        self._windows = _Windows(RECENT)
        self._is_failing = False

    def feed(self, observation: AnsweredRequest) -> None:
        """Take in the next request; what a client did wrong tells nothing of the endpoint."""
        if observation.is_error or observation.status < 400:
            self._windows.add(float(observation.is_error), not self._is_failing)

    def check(self) -> Alert | None:
        """Errors, told when they begin."""
        recent, usual = self._windows.recent, self._windows.usual
        num_errors = int(sum(recent))
        if self._is_failing:
            self._is_failing = num_errors >= MIN_ERRORS
            return None
        rate = max(LEAST_RATE, (sum(usual) + 1) / (len(usual) + 2) if len(usual) >= MIN_USUAL else LEAST_RATE)
        if num_errors < MIN_ERRORS or (surprise := -log10_tail(num_errors, len(recent), rate)) <= SURPRISE:
            return None
        self._is_failing = True
        return Alert(
            "errors",
            f"{num_errors} of its last {len(recent)} requests failed, {100 * rate:.2g} % are usual",
            f"the last {len(recent)} requests (powers of ten of the binomial tail)",
            surprise,
            SURPRISE,
        )


def log10_tail(num: int, of: int, rate: float) -> float:
    """How unlikely `num` or more successes are in `of` trials, as a power of ten."""
    tail = sum(math.comb(of, k) * rate**k * (1 - rate) ** (of - k) for k in range(num, of + 1))
    return math.log10(max(tail, 1e-300))


class PromptDriftDetector:
    """Prompts are of another length than before."""

    def __init__(self) -> None:
        self._windows = _Windows(RECENT_PROMPTS)
        self._count = 0

    def feed(self, observation: AnsweredRequest) -> None:
        """Take in the next request."""
        if observation.prompt_tokens is not None:
            self._windows.add(observation.prompt_tokens)
            self._count += 1

    def check(self) -> Alert | None:
        """Another mix of prompts; it is usual from then on."""
        recent, usual = self._windows.recent, self._windows.usual
        if not self._windows.are_full or self._count % DRIFT_EVERY:
            return None
        index = population_stability(usual, recent)
        if index <= MAJOR:
            return None
        before, now, num_recent = median(usual), median(recent), len(recent)
        self._windows.begin_again()
        return Alert(
            "prompt-drift",
            f"prompts are not what they were: {now:.0f} tokens in the median, {before:.0f} before",
            f"the last {num_recent} prompts beside those before (population stability index of their lengths)",
            index,
            MAJOR,
        )


class EndpointDetectors:
    """All of one endpoint."""

    def __init__(self) -> None:
        self._detectors: Sequence[Detector[AnsweredRequest]] = (
            LatencyDetector(), ErrorDetector(), PromptDriftDetector(),
        )  # fmt: skip

    def answered(self, request: AnsweredRequest) -> list[Alert]:
        """What the next request tells."""
        found = []
        for detector in self._detectors:
            detector.feed(request)
            if (alert := detector.check()) is not None:
                found.append(alert)
        return found
