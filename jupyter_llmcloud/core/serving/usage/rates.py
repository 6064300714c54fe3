"""What went through an endpoint of late: requests, tokens, errors, and how long the first token took."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

WINDOW_S = 60.0
MAX_KEPT = 20_000


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A request that is over; `t` in seconds. A client that hung up is no error."""

    t: float
    status: int
    first_byte_s: float | None = None
    num_tokens: int = 0


class RateWindow:
    """Requests of the last `window_s` seconds. Seconds per `now` are those of `Answered.t`.

    Of more than MAX_KEPT in that time the newest tell, over the time in which they came.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self.window_s = window_s
        self._answered: deque[Answered] = deque(maxlen=MAX_KEPT)

    def add(self, answered: Answered) -> None:
        """A request is over."""
        self._answered.append(answered)

    def rates(self, now: float) -> dict[str, float | None]:
        """Per second over the window, and the median seconds until the first byte of an answer."""
        recent = [row for row in self._answered if now - row.t < self.window_s]
        span_s = self.window_s
        if len(recent) == MAX_KEPT:
            span_s = max(now - min(row.t for row in recent), 1e-3)
        firsts = [row.first_byte_s for row in recent if row.first_byte_s is not None]
        num_errors = sum(row.status >= 400 and row.status != 499 for row in recent)
        return {
            "window_s": self.window_s,
            "requests_per_s": round(len(recent) / span_s, 4),
            "tokens_per_s": round(sum(row.num_tokens for row in recent) / span_s, 3),
            "errors_per_s": round(num_errors / span_s, 4),
            "first_token_s": round(median(firsts), 4) if firsts else None,
        }
