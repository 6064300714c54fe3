"""Who gives slots back, and who comes first, by the priorities that were stated: values alone."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.scheduling.priorities import Lender, Shortage, give_way
from jupyter_llmcloud.core.scheduling.queue import Capacity, PlacementQueue

LOW = Lender("low", priority=0, num_replicas=3, min_replicas=1, slots_each=1, held=3)
HIGH = Lender("high", priority=1, num_replicas=2, min_replicas=0, slots_each=2, held=4)


def lack(missing: int, priority: int) -> Shortage:
    return Shortage("local", missing, priority)


@pytest.mark.parametrize(
    ("missing", "priority", "kept"),
    [
        (1, 0, {}),  # of equal priority: who is there first stays
        (1, 1, {"low": 2}),
        (2, 2, {"low": 1, "high": 2}),  # the lowest gives first, and no more than is missing
        (3, 2, {"low": 1, "high": 1}),
        (6, 2, {"low": 1, "high": 0}),
        (7, 2, {"low": 3, "high": 2}),  # all that could be given is not enough: nobody gives anything
        (3, 1, {"low": 3}),  # never below the least
        (0, 5, {"low": 3, "high": 2}),  # enough is free or on its way: but nobody grows
    ],
)
def test_endpoints_of_lower_priority_give_what_is_missing(missing: int, priority: int, kept: dict[str, int]) -> None:
    assert give_way(lack(missing, priority), [HIGH, LOW]) == kept


def test_what_is_given_back_already_is_counted_and_no_more_is_asked_for() -> None:
    draining = Lender("low", priority=0, num_replicas=1, min_replicas=0, slots_each=1, held=3)
    assert give_way(lack(2, 1), [draining]) == {"low": 1}
    assert give_way(lack(3, 1), [draining]) == {"low": 0}


def test_an_endpoint_that_shares_its_cores_has_no_slots_to_give() -> None:
    sharing = Lender("low", priority=0, num_replicas=3, min_replicas=0, slots_each=0, held=0)
    assert give_way(lack(1, 1), [sharing]) == {"low": 3}


def ask(line: PlacementQueue, ticket: str, number: int, free: int, priority: float, now: float = 0.0) -> bool:
    return line.ask(ticket, number, Capacity(free, 4), f"{ticket}@{now}", now, priority=priority).goes


def test_the_higher_priority_goes_first_whoever_came_first() -> None:
    line = PlacementQueue()
    assert not ask(line, "training", 2, free=0, priority=0)
    assert not ask(line, "urgent", 2, free=0, priority=1)
    assert not ask(line, "training", 2, free=2, priority=0, now=1.0)
    assert ask(line, "urgent", 2, free=2, priority=1, now=1.0)


def test_of_one_priority_first_come_first_served() -> None:
    line = PlacementQueue()
    assert not ask(line, "first", 2, free=0, priority=3)
    assert not ask(line, "second", 2, free=0, priority=3)
    assert not ask(line, "second", 2, free=2, priority=3, now=1.0)
    assert ask(line, "first", 2, free=2, priority=3, now=1.0)


def test_a_replica_waits_for_a_world_of_higher_priority_only_and_keeps_its_turn_without_asking_often() -> None:
    line = PlacementQueue()
    assert not ask(line, "world", 2, free=0, priority=1)

    def replica(free: int, priority: float, now: float) -> bool:
        name = f"replica {priority}"
        return line.ask(name, 1, Capacity(free, 4), name, now, priority=priority + 0.5, lease_s=4.0).goes

    assert not replica(2, 0, 1.0)  # both slots are kept for the world
    assert replica(2, 1, 1.0)
    assert not replica(0, 1, 1.1)  # another one took the slot: it asks again
    assert not ask(line, "world", 2, free=2, priority=1, now=1.2)  # one of them is the replica's, who waits
    assert not ask(line, "world", 2, free=2, priority=1, now=3.1)
    assert ask(line, "world", 2, free=2, priority=1, now=5.2)  # it has not asked again


def test_waiting_holds_nothing_so_two_that_wait_for_each_others_slots_both_get_theirs() -> None:
    """A world that needs all slots and a replica of higher priority: whichever is first, the other one comes next."""
    line = PlacementQueue()
    assert not ask(line, "world", 4, free=3, priority=0)
    assert line.ask("replica", 1, Capacity(3, 4), "replica", 0.1, priority=1.5, lease_s=4.0).goes
    assert not ask(line, "world", 4, free=3, priority=0, now=1.0)  # the replica has its slot
    line.leave("replica")
    assert ask(line, "world", 4, free=4, priority=0, now=2.0)  # ... and has ended
