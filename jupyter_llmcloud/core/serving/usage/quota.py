"""How much a key may ask: requests and tokens per minute, and requests at once. Time is passed in.

The windows slide: in no 60 seconds is more let in than the limit says. Tokens are reserved when a request comes, by an
estimate, and settled when its answer has ended: what was not spent is given back to the second of the reservation, what
was spent beyond it counts from the end of the answer (a long answer cannot outlive its own window).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW_S = 60
REQUESTS, TOKENS, PARALLEL = "requests", "tokens", "parallel requests"


@dataclass(frozen=True)
class KeyLimits:
    """What a key may use; None is no limit.

    Attributes:
        requests_per_minute: in any 60 seconds.
        tokens_per_minute: of prompts and answers together, in any 60 seconds.
        parallel_requests: that are being answered at the same time.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None

    @property
    def any(self) -> bool:
        """Is there a limit at all?"""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.parallel_requests)
        return limits != (None, None, None)


class Window:
    """An amount by the seconds in which it was spent, of the last minute."""

    def __init__(self) -> None:
        self._spent: deque[list[int]] = deque()  # [second, amount], in order
        self._total = 0

    def add(self, amount: int, now: float) -> None:
        """Something is spent; what is told late counts for the newest second that is known."""
        second = math.floor(now)
        if self._spent and self._spent[-1][0] >= second:
            self._spent[-1][1] += amount
        else:
            self._spent.append([second, amount])
        self._total += amount

    def take_back(self, amount: int, at: float, now: float) -> None:
        """Something that was spent at `at` was not needed; of a second that has left the window, nothing is left."""
        self.total(now)
        second = math.floor(at)
        for row in reversed(self._spent):
            if row[0] <= second:
                taken = min(amount, row[1]) if row[0] == second else 0
                row[1] -= taken
                self._total -= taken
                return

    def total(self, now: float) -> int:
        """What was spent within the last 60 seconds; of the second in which these begin, all."""
        while self._spent and now - self._spent[0][0] >= WINDOW_S + 1:
            self._total -= self._spent.popleft()[1]
        return self._total

    def wait_s(self, amount: int, limit: int, now: float) -> float:
        """Seconds until `amount` more fits below `limit`; 0 when it does so now."""
        excess = self.total(now) + amount - limit
        for second, spent in self._spent:
            if excess <= 0:
                break
            excess -= spent
            left_at = second + WINDOW_S + 1
            if excess <= 0:
                return max(0.0, left_at - now)
        return 0.0 if excess <= 0 else float(WINDOW_S)

    def reset_s(self, now: float) -> float:
        """Seconds until all of it has left the window."""
        self.total(now)
        last = next((second for second, spent in reversed(self._spent) if spent), None)
        return 0.0 if last is None else max(0.0, last + WINDOW_S + 1 - now)


class QuotaExceeded(Exception):
    """A request is over a limit of its key.

    Attributes:
        limited: requests, tokens or parallel requests.
        retry_after_s: when it would be let in, as far as that is known.
    """

    def __init__(self, limited: str, limit: int, retry_after_s: float) -> None:
        per = "at once" if limited == PARALLEL else "per minute"
        what = REQUESTS if limited == PARALLEL else limited
        super().__init__(f"its limit is {limit} {what} {per}")
        self.limited = limited
        self.retry_after_s = retry_after_s


@dataclass
class Reservation:
    """What a request was let in with; settled once."""

    t: float
    num_tokens: int
    is_open: bool = True
    is_settled: bool = False


class KeyQuota:
    """What one key has used of late, beside its limits."""

    def __init__(self, earlier: Iterable[tuple[float, int]] = ()) -> None:
        """`earlier`: when each request of the last minute ended, and its tokens; the oldest first."""
        self._requests, self._tokens = Window(), Window()
        self.num_open = 0
        for t, num_tokens in earlier:
            self._requests.add(1, t)
            self._tokens.add(num_tokens, t)

    def reserve(self, limits: KeyLimits, num_tokens: int, now: float) -> Reservation:
        """Let a request in. Raises QuotaExceeded; then nothing was reserved.

        One that is estimated at more than the limit is let in when nothing else was spent in the last minute.
        """
        if limits.parallel_requests is not None and self.num_open >= limits.parallel_requests:
            raise QuotaExceeded(PARALLEL, limits.parallel_requests, 1.0)
        if (limit := limits.requests_per_minute) is not None and (wait := self._requests.wait_s(1, limit, now)):
            raise QuotaExceeded(REQUESTS, limit, wait)
        if (limit := limits.tokens_per_minute) is not None:
            num_tokens = min(num_tokens, limit)
            if wait := self._tokens.wait_s(num_tokens, limit, now):
                raise QuotaExceeded(TOKENS, limit, wait)
        self._requests.add(1, now)
        self._tokens.add(num_tokens, now)
        self.num_open += 1
        return Reservation(now, num_tokens)

    def close(self, reservation: Reservation) -> None:
        """The answer has ended: the request is no more one of those at once."""
        if reservation.is_open:
            reservation.is_open = False
            self.num_open -= 1

    def settle(self, reservation: Reservation, num_tokens: int, now: float) -> None:
        """The answer has cost so many tokens."""
        self.close(reservation)
        if reservation.is_settled:
            return
        reservation.is_settled = True
        if num_tokens < reservation.num_tokens:
            self._tokens.take_back(reservation.num_tokens - num_tokens, reservation.t, now)
        else:
            self._tokens.add(num_tokens - reservation.num_tokens, now)

    def is_idle(self, now: float) -> bool:
        """Is there nothing to remember?"""
        return not self.num_open and not self._requests.total(now) and not self._tokens.total(now)

    def headers(self, limits: KeyLimits, now: float) -> dict[str, str]:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` of the limits there are, as OpenAI writes them."""
        headers: dict[str, str] = {}
        for name, limit, window in (
            (REQUESTS, limits.requests_per_minute, self._requests),
            (TOKENS, limits.tokens_per_minute, self._tokens),
        ):
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - window.total(now)))
                headers[f"x-ratelimit-reset-{name}"] = duration(window.reset_s(now))
        return headers


def duration(seconds: float) -> str:
    """As Go writes it, and OpenAI's headers do: `850ms`, `6s`, `1m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms" if seconds > 0 else "0s"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
