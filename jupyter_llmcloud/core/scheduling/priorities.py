"""One pool for training and serving: who gives slots back when a world waits for some, by the stated priorities.

Slots are never taken from ranks, nor from the replicas that an endpoint has at least: who is there first keeps its
place. What an endpoint has beyond that, because its load asked for it, it gives back to a world of higher priority; and
as long as such a world waits, it does not grow. Whoever waits holds nothing, so nobody can wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shortage:
    """A world waits.

    Attributes:
        cluster: where.
        missing: slots that it lacks, beside those that are free.
        priority: of the world.
        held: slots of each replica of the cluster, by its id.
    """

    cluster: str
    missing: int
    priority: int
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Lender:
    """An endpoint that follows its load.

    Attributes:
        num_replicas: that it is to have now; min_replicas: that it has in any case.
        slots_each: of a replica.
        held: slots of all its replicas, also of those that are on their way out.
    """

    endpoint: str
    priority: int
    num_replicas: int
    min_replicas: int
    slots_each: int
    held: int

    @property
    def coming(self) -> int:
        """Slots that it gives back already."""
        return max(0, self.held - self.num_replicas * self.slots_each)

    @property
    def spare(self) -> int:
        """Replicas that it can do without."""
        return max(0, self.num_replicas - self.min_replicas) if self.slots_each else 0


def give_way(shortage: Shortage, lenders: Sequence[Lender]) -> dict[str, int]:
    """How many replicas each endpoint of lower priority is to have as long as the world waits, by its name.

    The endpoint of the lowest priority gives first, and no more than is missing. When all that could be given is not
    enough, nothing is: the world waits, and the endpoints only do not grow.
    """
    lower = sorted((one for one in lenders if one.priority < shortage.priority), key=lambda one: one.priority)
    kept = {one.endpoint: one.num_replicas for one in lower}
    missing = shortage.missing - sum(one.coming for one in lower)
    if missing > sum(one.spare * one.slots_each for one in lower):
        return kept
    for one in lower:
        if missing > 0 and one.spare:
            given = min(one.spare, -(-missing // one.slots_each))
            kept[one.endpoint] -= given
            missing -= given * one.slots_each
    return kept
