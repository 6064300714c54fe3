"""Who comes first when several want the slots of one cluster: worlds and replicas. Nobody holds any while waiting."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

LEASE_S = 2.0  # who has not asked again for so long does not wait any more
ARRIVES_S = 0.5  # who was sent to start a world has taken its slots by then
MAX_PASSED = 8


@dataclass
class _Waiter:
    ticket: str
    renewed_at: float
    num_ranks: int = 0  # not known before the cluster has been looked at
    num_passed: int = 0  # how many who came later were served first
    world_id: str = ""  # of the world that it was sent to start
    arrives_s: float = ARRIVES_S  # until it has taken its slots, or asks again
    priority: float = 0
    lease_s: float = LEASE_S


@dataclass(frozen=True)
class Capacity:
    """What a cluster has: slots, the ids of its worlds, and of those that were started lately and may have ended."""

    free: int
    total: int
    worlds: Collection[str] = ()
    begun: Collection[str] = ()


@dataclass(frozen=True)
class Admission:
    """Whether the ranks may start now; if not, how many slots are free for them, how many ranks wait ahead of them."""

    goes: bool
    free: int = 0
    before: int = 0


class PlacementQueue:
    """The highest priority first, and of one priority first come, first served; time is an argument.

    Who asks again within `LEASE_S` keeps its place, also when it was sent to start a world and found the slots taken.
    Those ahead who could be placed now go first. One who cannot may be passed by `MAX_PASSED` others that need less;
    from then on what gets free is kept for it, so that small worlds cannot keep a large one out for ever.
    """

    def __init__(self) -> None:
        self._places: list[_Waiter] = []

    def __len__(self) -> int:
        return len(self._places)

    def renew(self, ticket: str, now: float, priority: float = 0, lease_s: float = LEASE_S) -> None:
        """The holder of a ticket asks: it waits where it has waited, or behind all of its priority."""
        place = self._find(ticket)
        if place is None:
            ahead = [at for at, other in enumerate(self._places, 1) if other.priority >= priority]
            self._places.insert(ahead[-1] if ahead else 0, _Waiter(ticket, now, priority=priority, lease_s=lease_s))
        else:
            place.renewed_at, place.world_id = now, ""

    def leave(self, ticket: str) -> None:
        """The holder of a ticket waits no more."""
        self._places = [place for place in self._places if place.ticket != ticket]

    def ask(
        self,
        ticket: str,
        num_ranks: int,
        cluster: Capacity,
        world_id: str,
        now: float,
        trades: int = 0,
        priority: float = 0,
        lease_s: float = LEASE_S,
    ) -> Admission:
        """May this one start `num_ranks` ranks, as world `world_id`? Who has no ticket comes after all others.

        A replica asks in the same way, for its slots; `lease_s` is how long it keeps its place without asking again.

        Who `trades` this many slots that it holds, counted as free in `cluster`, has time to end what is there. It
        comes first when it needs no others: nobody who waits could have them.
        """
        self._forget(cluster.begun, now)
        if trades and num_ranks <= trades and self._find(ticket) is None:
            self._places.insert(0, _Waiter(ticket, now, priority=priority))
        if ticket:
            self.renew(ticket, now, priority, lease_s)
        own = self._find(ticket) if ticket else None
        if own is not None:
            own.num_ranks = num_ranks
        free = cluster.free - sum(place.num_ranks for place in self._under_way(cluster, now))
        before, passed = 0, []
        for place in self._places:
            if place is own:
                break
            if place.world_id or place.num_ranks > cluster.total:
                continue
            if place.num_ranks <= free:
                free -= place.num_ranks
            elif place.num_passed < MAX_PASSED:
                passed.append(place)
                continue
            else:
                free = 0
            before += place.num_ranks
        if num_ranks > free:
            return Admission(False, max(0, free), before)
        for place in passed:
            place.num_passed += 1
        if own is not None:
            own.world_id, own.arrives_s = world_id, LEASE_S if trades else ARRIVES_S
        return Admission(True, free, before)

    def _find(self, ticket: str) -> _Waiter | None:
        return next((place for place in self._places if place.ticket == ticket), None)

    def _forget(self, begun: Collection[str], now: float) -> None:
        self._places = [
            place for place in self._places if place.world_id not in begun and now - place.renewed_at <= place.lease_s
        ]

    def _under_way(self, cluster: Capacity, now: float) -> list[_Waiter]:
        """Those who were sent and have not taken their slots yet."""
        sent = [place for place in self._places if place.world_id and now - place.renewed_at <= place.arrives_s]
        return [place for place in sent if place.world_id not in cluster.worlds]
