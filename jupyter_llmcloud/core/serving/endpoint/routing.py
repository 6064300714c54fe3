"""Which replica answers a request: the one with the fewest tokens before it, measured by how fast it is.

A request belongs to one revision first, chosen by the weights and always the same for one key. Of that revision's
replicas it goes to the one that will be through soonest; of those that are about as good, to one that has seen the
beginning of the prompt, or has the adapter in use. Estimates only order replicas: nothing is refused by them.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PREFIX_BYTES = 512
MIN_PREFIX_BYTES = 64
BYTES_PER_TOKEN = 4
DEFAULT_ANSWER_TOKENS = 128
MAX_TOKENS = 1 << 20
MAX_PREFIXES = 512
ABOUT_AS_GOOD = 1.25
SPEED_WEIGHT = 0.2  # of the newest measurement
MIN_MEASURED_TOKENS = 8
SLOWEST, FASTEST = 0.25, 4.0  # relative to the mean of an endpoint's replicas


class RequestShape(NamedTuple):
    """What routing knows of a request, as cheaply as it can be had from its bytes.

    Attributes:
        num_tokens: of the prompt and the longest answer, roughly.
        num_prompt_tokens: of the prompt alone.
        prefix: a hash of the first part of the prompt; 0: too short to be worth remembering.
        adapter: the adapter that is asked for.
        key: whose requests stay with one revision.
        replica: the one that keeps what the request goes on from, by its id; "": any will do.
    """

    num_tokens: int = 1
    num_prompt_tokens: int = 0
    prefix: int = 0
    adapter: str = ""
    key: str = ""
    replica: str = ""

    @classmethod
    def estimate(
        cls,
        prompt: bytes | memoryview,
        max_tokens: object,
        num_choices: object,
        adapter: str = "",
        key: str = "",
        replica: str = "",
    ) -> RequestShape:
        """From the prompt as it stands in the body (JSON); values of other types than numbers count as left out."""
        num_prompt = len(prompt) // BYTES_PER_TOKEN + 1
        answer = max_tokens if type(max_tokens) is int and max_tokens >= 0 else DEFAULT_ANSWER_TOKENS
        choices = num_choices if type(num_choices) is int and num_choices > 0 else 1
        total = min(MAX_TOKENS, num_prompt + answer * choices)
        prefix = zlib.crc32(prompt[:PREFIX_BYTES]) or 1 if len(prompt) >= MIN_PREFIX_BYTES else 0
        return cls(total, num_prompt, prefix, adapter, key, replica)


@dataclass
class ReplicaLoad:
    """One replica as routing sees it.

    Attributes:
        revision: whose requests it gets.
        capacity: how many requests it answers at once.
        num_in_flight: how many it answers now.
        outstanding_tokens: of those, prompts and longest answers together.
        tokens_per_s: of one answer, smoothed; None: not measured yet.
        adapters: those that it has answered with lately, the newest last.
    """

    revision: int = 0
    capacity: int = 32
    num_in_flight: int = 0
    outstanding_tokens: int = 0
    tokens_per_s: float | None = None
    adapters: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def is_free(self) -> bool:
        """Whether it can begin another request now."""
        return self.num_in_flight < self.capacity

    def has_seen(self, prefix: int) -> bool:
        """Whether a prompt that begins so came here before."""
        return prefix in self._prefixes

    def enter(self, shape: RequestShape) -> None:
        """A request goes there."""
        self.num_in_flight += 1
        self.outstanding_tokens += shape.num_tokens
        if shape.prefix:
            _remember(self._prefixes, shape.prefix, MAX_PREFIXES)
        if shape.adapter:
            _remember(self.adapters, shape.adapter, 8)

    def leave(self, shape: RequestShape) -> None:
        """It is over: what was counted for it is settled."""
        self.num_in_flight -= 1
        self.outstanding_tokens -= shape.num_tokens

    def measure(self, num_tokens: int, seconds: float) -> None:
        """An answer of so many tokens took so long."""
        if num_tokens < MIN_MEASURED_TOKENS or seconds <= 0:
            return
        rate, before = num_tokens / seconds, self.tokens_per_s
        self.tokens_per_s = rate if before is None else before + SPEED_WEIGHT * (rate - before)

    def forget(self) -> None:
        """Its cache is empty: what it had seen does not count any more."""
        self._prefixes.clear()


def _remember(known: OrderedDict[Any, None], entry: Any, limit: int) -> None:
    known[entry] = None
    known.move_to_end(entry)
    if len(known) > limit:
        known.popitem(last=False)


def pick_revision(weights: Mapping[int, int], key: str) -> int:
    """One of the revisions (their weights by their numbers): for one key always the same, as long as weights are.

    When the share of the newest revision grows, keys only move to it, and none away. Raises ValueError without any.
    """
    total = sum(weights.values())
    if total <= 0:
        raise ValueError("no revision has a weight")
    point = (zlib.crc32(b"split:" + key.encode(errors="replace")) % 10_000) / 10_000 * total
    for revision in sorted(weights, reverse=True):
        point -= weights[revision]
        if point < 0:
            return revision
    return min(weights)


def pick_replica(shape: RequestShape, loads: Mapping[int, ReplicaLoad]) -> int | None:
    """The number of the replica that takes a request; None when none of them is free."""
    free = {number: load for number, load in loads.items() if load.is_free}
    if not free:
        return None
    speeds = relative_speeds(free)
    waits = {number: load.outstanding_tokens / speeds[number] for number, load in free.items()}
    least = min(waits.values())
    slack = least * ABOUT_AS_GOOD + shape.num_prompt_tokens if shape.prefix or shape.adapter else least
    near = [number for number, wait in waits.items() if wait <= slack]

    def rank(number: int) -> tuple[bool, bool, float, int, int]:
        load = free[number]
        knows = bool(shape.prefix) and load.has_seen(shape.prefix)
        adapted = bool(shape.adapter) and shape.adapter in load.adapters
        return (not knows, not adapted, waits[number], load.num_in_flight, number)

    return min(near, key=rank)


def relative_speeds(loads: Mapping[int, ReplicaLoad]) -> dict[int, float]:
    """How fast each is beside the mean of those that were measured; 1 for one that was not."""
    known = [load.tokens_per_s for load in loads.values() if load.tokens_per_s]
    mean = sum(known) / len(known) if known else 1.0
    return {
        number: min(FASTEST, max(SLOWEST, load.tokens_per_s / mean)) if load.tokens_per_s else 1.0
        for number, load in loads.items()
    }


@dataclass
class CircuitBreaker:
    """Keeps requests away from a replica that fails them although it says that it is well.

    closed: it gets requests. open: none, until `retry_at`. Then one request tries it: closed again if that is answered,
    else open for twice as long.
    """

    max_failures: int = 5
    open_s: float = 5.0
    max_open_s: float = 60.0
    num_failures: int = 0
    retry_at: float | None = None
    _open_for_s: float = 0.0
    _trying: bool = False

    def note(self, failed: bool, now: float) -> None:
        """A request to the replica is over."""
        self._trying = False
        if not failed:
            self.num_failures, self.retry_at, self._open_for_s = 0, None, 0.0
            return
        self.num_failures += 1
        is_open = self.retry_at is not None and now < self.retry_at  # of those that it was asked before it opened
        if self.num_failures >= self.max_failures and not is_open:
            self._open_for_s = min(self.max_open_s, 2 * self._open_for_s or self.open_s)
            self.retry_at = now + self._open_for_s

    def lets_through(self, now: float) -> bool:
        """Whether a request may go there now."""
        return self.retry_at is None or (now >= self.retry_at and not self._trying)

    def entered(self) -> None:
        """A request goes there: of a breaker that is open the one that tries."""
        self._trying = self.retry_at is not None

    def abandoned(self) -> None:
        """The request that tried was given up by its client: it says nothing."""
        self._trying = False


def closed(breakers: Mapping[int, CircuitBreaker], now: float) -> Collection[int]:
    """The replicas that get requests; all of them when none would: a doubtful answer is better than none."""
    return [number for number, breaker in breakers.items() if breaker.lets_through(now)] or list(breakers)
