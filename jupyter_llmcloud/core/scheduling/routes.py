"""Which route to take to a worker: straight to it, or through the scheduler, as rules by values.

Straight is tried first. A worker that could not be reached so is reached through the scheduler from then on, and tried
straight again after a while that doubles each time: a firewall seldom opens, a network that was down comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DIRECT = "direct"
RELAYED = "relayed"


@dataclass
class Routes:
    """What is known of the routes to the workers of a cluster, by their addresses."""

    retry_s: float = 60.0
    max_retry_s: float = 3600.0
    _closed_until: dict[str, float] = field(default_factory=dict)
    _retry_s: dict[str, float] = field(default_factory=dict)

    def order(self, worker: str, now: float) -> tuple[str, str]:
        """The routes to try, the better one first."""
        closed = now < self._closed_until.get(worker, now)
        return (RELAYED, DIRECT) if closed else (DIRECT, RELAYED)

    def failed(self, worker: str, route: str, now: float) -> None:
        """A route did not lead there."""
        if route == DIRECT:
            wait_s = self._retry_s.get(worker, self.retry_s)
            self._closed_until[worker] = now + wait_s
            self._retry_s[worker] = min(2 * wait_s, self.max_retry_s)

    def worked(self, worker: str, route: str) -> None:
        """A route led there."""
        if route == DIRECT:
            self._closed_until.pop(worker, None)
            self._retry_s.pop(worker, None)
