"""The link between a leading and a following agent: it outlives their connections, but not their leases.

Rules by values. A leader and an agent that follows it may speak through workers and a scheduler that are killed and
replaced meanwhile. So messages are numbered, kept until the other end has them, and sent again on the next connection.

Each end must know how long the other one still counts on it. Every message carries the time at which it was sent and
the newest time received from the other end. One's own time, when it comes back, proves until when one was heard. The
follower's ranks live for `lease_s` after the newest time that its leader has proven to have heard; the leader gives the
follower up when it has heard nothing for longer than that. By then the follower's ranks have ended: no two copies ever
train, and no clocks of different hosts are compared.

The other end may also stand by, to lead in this one's place once this one has gone. It does so a good while after it
has heard the last message. The leader, and the ranks beside it, go on without a new claim to lead for a shorter while
after the newest time that the other end has proven to have heard: again no two lead.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

PATIENCE = 1.25  # times the lease: clocks may run by this much apart
LEADS = 1.5  # times the lease: a leader that stands still has no rank left after that
TAKES_OVER = 2.5  # times the lease: by then each of the leader's other followers has ended its ranks, too
MAX_KEPT = 256 << 20  # bytes sent to an end that cannot be reached; beyond it is given up


@dataclass(frozen=True)
class LinkHeader:
    """Accompanies every message: its number (0: a heartbeat, without a message), and the newest number received."""

    number: int
    received: int
    at: float
    echo: float


@dataclass
class LeaseLink:
    """One end. Times are seconds of this end's own monotonic clock."""

    lease_s: float
    began: float
    over: bool = False
    _heard_at: float = 0.0
    _proven: float = 0.0
    _their_at: float = 0.0
    _sent: int = 0
    _received: int = 0
    _kept: deque[tuple[int, bytes]] = field(default_factory=deque)
    _kept_bytes: int = 0

    def __post_init__(self) -> None:
        self._heard_at = self._proven = self.began

    @property
    def received(self) -> int:
        """The number of the newest message that has come."""
        return self._received

    @property
    def expires_at(self) -> float:
        """Until when the other end surely has not given this one up."""
        return self._proven + self.lease_s

    @property
    def leads_until(self) -> float:
        """Until when the other end surely has not begun to lead in this one's place."""
        return self._proven + LEADS * self.lease_s

    @property
    def takes_over_at(self) -> float:
        """When the other end, silent until then, surely leads no more."""
        return self._heard_at + TAKES_OVER * self.lease_s

    def check(self, now: float) -> bool:
        """Whether the link still holds for the end that others count on (the follower's); once over, for ever."""
        self.over = self.over or now >= self.expires_at
        return not self.over

    def is_given_up(self, now: float) -> bool:
        """Whether the other end has been silent for longer than its lease lasts (the leader's question)."""
        silent = now - self._heard_at > PATIENCE * self.lease_s
        self.over = self.over or silent or self._kept_bytes > MAX_KEPT
        return self.over

    def is_unheard(self, now: float) -> bool:
        """Whether the other end may not have heard this one for longer than the lease lasts."""
        return now - self._proven > PATIENCE * self.lease_s

    def send(self, message: bytes, now: float) -> LinkHeader:
        """Keep a message until the other end has it; returns the header to send with it."""
        self._sent += 1
        self._kept.append((self._sent, message))
        self._kept_bytes += len(message)
        return self.header(now, self._sent)

    def header(self, now: float, number: int = 0) -> LinkHeader:
        """The header of a message; without a number it is a heartbeat."""
        return LinkHeader(number, self._received, now, self._their_at)

    def hear(self, header: LinkHeader, now: float) -> bool:
        """Something has come; returns whether its message is new. A silence that was too long is not made up for."""
        if self.is_given_up(now):
            return False
        self._heard_at = now
        self._their_at = max(self._their_at, header.at)
        self._proven = max(self._proven, min(header.echo, now)) if header.echo else self._proven
        self._forget(header.received)
        if header.number != self._received + 1:
            return False  # a heartbeat, or sent again
        self._received = header.number
        return True

    def again(self, received: int, now: float) -> list[tuple[LinkHeader, bytes]]:
        """What the other end lacks, to be sent again on a new connection."""
        self._forget(received)
        return [(self.header(now, number), message) for number, message in self._kept]

    def _forget(self, received: int) -> None:
        while self._kept and self._kept[0][0] <= received:
            self._kept_bytes -= len(self._kept.popleft()[1])
