"""What keys have used of late: requests are let in by it, and settled when they have ended.

It is remembered in memory, per server. A server that starts, or sees a key for the first time, reads the last minute of
that key from the table of usage: a restart gives nobody a fresh minute. What is open at once is not carried over, since
a restart ends it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.core.serving.usage.quota import PARALLEL, KeyQuota, QuotaExceeded, Reservation

if TYPE_CHECKING:
    from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

FORGET_EVERY_S = 60.0
LARGE_BODIES = 128 << 20


class BodyBudget:
    """Memory for large bodies: what they have above what any body may have, of all requests together."""

    def __init__(self, max_bytes: int = LARGE_BODIES) -> None:
        self._left = max_bytes

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for so many bytes more, which then is taken."""
        if num_bytes > self._left:
            return False
        self._left -= num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """A body is not held any more."""
        self._left += num_bytes


@dataclass
class KeyReservation:
    """What a request with a key was let in with."""

    quota: KeyQuota
    reserved: Reservation

    def close(self) -> None:
        """The answer has ended."""
        self.quota.close(self.reserved)

    def settle(self, num_tokens: int | None) -> None:
        """What it has cost is known, or will never be (None): then it was what was reserved."""
        spent = self.reserved.num_tokens if num_tokens is None else num_tokens
        self.quota.settle(self.reserved, spent, time.monotonic())


class KeyQuotas:
    """The quotas of the keys that were used within the last minutes.

    Attributes:
        bodies: memory for the large bodies of all of them.
    """

    def __init__(self, state: ServerState) -> None:
        self.bodies = BodyBudget()
        self._state = state
        self._quotas: dict[str, KeyQuota] = {}
        self._forgot_at = time.monotonic()

    def reserve(self, key: StoredKey, num_tokens: int) -> KeyReservation:
        """Let a request in that may cost so many tokens. Raises ApiError (429) when it is over a limit of its key."""
        now = time.monotonic()
        quota = self._quota(key, now)
        try:
            return KeyReservation(quota, quota.reserve(key.limits, num_tokens, now))
        except QuotaExceeded as error:
            wait = "one of them has ended" if error.limited == PARALLEL else f"{error.retry_after_s:.0f} s have passed"
            message = f"key {key.id} asks more than it may: {error}. Ask again when {wait}."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=error.retry_after_s) from None

    def hold(self, num_bytes: int) -> bool:
        """Whether so many bytes more of a large body may be held, which then are."""
        return self.bodies.take(num_bytes)

    def let_go(self, num_bytes: int) -> None:
        """So many bytes of a large body are not held any more."""
        self.bodies.give_back(num_bytes)

    def headers(self, key: StoredKey) -> dict[str, str]:
        """`x-ratelimit-*` of a key now."""
        now = time.monotonic()
        return self._quota(key, now).headers(key.limits, now) if key.limits.any else {}

    def _quota(self, key: StoredKey, now: float) -> KeyQuota:
        if now - self._forgot_at > FORGET_EVERY_S:
            self._forgot_at = now
            self._quotas = {name: quota for name, quota in self._quotas.items() if not quota.is_idle(now)}
        quota = self._quotas.get(key.id)
        if quota is None:
            quota = self._quotas[key.id] = KeyQuota(self._earlier(key, now))
        return quota

    def _earlier(self, key: StoredKey, now: float) -> list[tuple[float, int]]:
        if not key.limits.any:
            return []
        wall = time.time()
        return [(now - max(0.0, wall - t), tokens) for t, tokens in self._state.recent_requests(key.id, wall)]
