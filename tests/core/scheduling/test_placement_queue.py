"""Whose turn it is, by values: first come, first served, nobody waits for who has gone, nobody is kept out for ever."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from jupyter_llmcloud.core.scheduling.queue import ARRIVES_S, LEASE_S, MAX_PASSED, Admission, Capacity, PlacementQueue
from jupyter_llmcloud.errors import Busy
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.session import Session
from jupyter_llmcloud.magics.session.world_client import WorldClient

TOTAL = 4


@dataclass
class Cluster:
    """Slots, who holds them, and a clock; worlds take their slots as soon as it is their turn."""

    line: PlacementQueue = field(default_factory=PlacementQueue)
    held: dict[str, int] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    now: float = 0.0

    @property
    def free(self) -> int:
        return TOTAL - sum(self.held.values())

    def ask(self, ticket: str, num_ranks: int, starts: bool = True) -> bool:
        return self.verdict(ticket, num_ranks, starts).goes

    def verdict(self, ticket: str, num_ranks: int, starts: bool = True) -> Admission:
        world = f"{ticket}@{self.now}"
        told = self.line.ask(ticket, num_ranks, Capacity(self.free, TOTAL, self.held, self.begun), world, self.now)
        if told.goes and starts:
            self.held[world] = num_ranks
            self.begun.append(world)
        return told

    def end(self, ticket: str) -> None:
        self.held = {world: size for world, size in self.held.items() if not world.startswith(f"{ticket}@")}

    def pass_time(self, seconds: float, *waiting: tuple[str, int]) -> None:
        """Those who wait ask again meanwhile, in the order given."""
        end = self.now + seconds
        while self.now < end:
            self.now += min(0.25, end - self.now)
            for ticket, num_ranks in waiting:
                assert not self.ask(ticket, num_ranks)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_who_comes_to_an_empty_cluster_goes_at_once(cluster: Cluster) -> None:
    assert cluster.verdict("a", 4) == Admission(True, 4, 0)
    assert cluster.ask("a later one", 1) is False


def test_the_first_who_came_is_the_first_who_goes_whoever_asks_first(cluster: Cluster) -> None:
    cluster.ask("holder", 3)
    cluster.pass_time(1, ("a", 3), ("b", 3), ("c", 3))
    cluster.end("holder")
    assert cluster.verdict("c", 3) == Admission(False, 1, 3)
    assert not cluster.ask("b", 3)
    assert cluster.ask("a", 3)
    assert not cluster.ask("c", 3)
    cluster.end("a")
    assert not cluster.ask("c", 3)
    assert cluster.ask("b", 3)


def test_those_ahead_go_together_when_there_is_room_for_all(cluster: Cluster) -> None:
    cluster.ask("holder", 4)
    cluster.pass_time(1, ("a", 2), ("b", 1), ("c", 1))
    cluster.end("holder")
    assert [cluster.ask("c", 1), cluster.ask("b", 1), cluster.ask("a", 2)] == [True, True, True]


def test_nobody_waits_for_one_who_has_stopped_waiting(cluster: Cluster) -> None:
    cluster.ask("holder", 4)
    cluster.pass_time(1, ("gone", 3), ("here", 3))
    cluster.end("holder")
    cluster.now += LEASE_S / 2
    assert not cluster.ask("here", 3)
    cluster.now += LEASE_S / 2 + 0.01
    assert cluster.ask("here", 3)
    assert len(cluster.line) == 1


def test_one_who_leaves_is_not_waited_for(cluster: Cluster) -> None:
    cluster.ask("holder", 4)
    cluster.pass_time(1, ("a", 3), ("b", 3))
    cluster.end("holder")
    cluster.line.leave("a")
    assert cluster.ask("b", 3)


def test_one_who_asks_without_a_ticket_comes_after_all_others_and_keeps_nobody_out(cluster: Cluster) -> None:
    cluster.ask("holder", 4)
    cluster.pass_time(1, ("a", 3))
    cluster.end("holder")
    assert not cluster.ask("", 2)
    assert cluster.ask("", 1)
    assert cluster.ask("a", 3)
    assert len(cluster.line) == 1


def test_who_was_sent_and_found_the_slots_taken_keeps_its_place(cluster: Cluster) -> None:
    """By somebody of another server, for instance."""
    assert cluster.ask("a", 3, starts=False)
    assert not cluster.ask("b", 3)  # a is on its way
    cluster.held["a stranger"] = 3
    cluster.now += 0.1
    assert not cluster.ask("a", 3)
    cluster.pass_time(1, ("b", 3), ("a", 3))
    cluster.end("a stranger")
    cluster.held.clear()
    assert not cluster.ask("b", 3)
    assert cluster.ask("a", 3)


def test_who_was_sent_keeps_its_place_until_its_world_is_there(cluster: Cluster) -> None:
    """It has the slots of its own host while it is being started, and may yet be refused those of another one."""
    assert cluster.ask("a", 3, starts=False)
    cluster.held["a@0.0"] = 2  # being started
    cluster.now += ARRIVES_S / 2
    assert cluster.verdict("b", 3) == Admission(False, 2, 0)
    cluster.held.clear()
    assert cluster.ask("a", 3)
    assert not cluster.ask("b", 3)
    assert len(cluster.line) == 1


def test_a_world_that_has_ended_at_once_keeps_no_slots(cluster: Cluster) -> None:
    assert cluster.ask("a", 4)
    cluster.end("a")
    assert cluster.ask("b", 4)


def test_who_was_sent_and_never_arrived_keeps_slots_from_nobody_for_long(cluster: Cluster) -> None:
    assert cluster.ask("a", 3, starts=False)
    assert not cluster.ask("b", 3)
    cluster.now += ARRIVES_S + 0.01
    assert cluster.ask("b", 3)


def test_small_worlds_pass_a_large_one_that_has_no_room_but_not_for_ever(cluster: Cluster) -> None:
    cluster.ask("long", 2)
    assert not cluster.ask("large", 4)
    num_passed = 0
    for number in range(3 * MAX_PASSED):
        told = cluster.ask(f"small {number}", 1)
        num_passed += told
        assert told == (number < MAX_PASSED)
        assert not cluster.ask("large", 4)
        cluster.end(f"small {number}")
        cluster.now += 0.25
    assert num_passed == MAX_PASSED
    assert cluster.verdict("one more", 1) == Admission(False, 0, 4)
    cluster.end("long")
    assert cluster.ask("large", 4)


def test_one_who_wants_more_than_there_is_any_more_keeps_nobody_out(cluster: Cluster) -> None:
    cluster.ask("holder", 1)
    for _ in range(3):
        cluster.line.ask("too large", 8, Capacity(cluster.free, 8), "w", cluster.now)  # a worker was there then
    assert cluster.ask("a", 3)


@pytest.mark.parametrize("seed", range(20))
def test_under_any_order_of_asking_nobody_is_passed_more_often_than_allowed(seed: int) -> None:
    """Owners of all sizes who ask at any moment, start, end and come again: each is served, after a bounded number."""
    source, cluster = random.Random(seed), Cluster()
    waiting: dict[str, tuple[int, int]] = {}  # how many each wants, and how many had been served when it came
    ends: dict[str, float] = {}
    num_served, worst, arrivals = 0, 0, 0
    asked: dict[str, float] = {}
    for _ in range(4000):
        cluster.now += source.uniform(0, 0.1)
        for ticket in [ticket for ticket, end in ends.items() if end <= cluster.now]:
            cluster.end(ticket)
            del ends[ticket]
        while len(waiting) < 6:
            arrivals += 1
            waiting[f"t{arrivals}"] = (source.randint(1, TOTAL), num_served)
        overdue = [ticket for ticket in waiting if cluster.now - asked.get(ticket, cluster.now) > 1]
        ticket = source.choice(overdue or [*waiting])
        asked[ticket] = cluster.now
        num_ranks, came_at = waiting[ticket]
        if cluster.ask(ticket, num_ranks):
            worst = max(worst, num_served - came_at)
            num_served += 1
            ends[ticket] = cluster.now + source.uniform(0, 0.5)
            del waiting[ticket]
        assert sum(cluster.held.values()) <= TOTAL
    assert num_served > 300
    assert worst <= 25  # without a line it is 44 to 83


def test_a_notebook_waits_with_one_ticket_and_starts_the_world_that_it_was_sent_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Server:
        def place(self, cluster: str, num_ranks: int, ticket: str, priority: int) -> dict[str, Any]:
            asked.append(ticket)
            if len(asked) < 4:
                raise Busy("others come first.")
            return {"cluster": cluster, "num_ranks": num_ranks, "world_id": "w1", "started": False, "agents": []}

    tickets = set()
    monkeypatch.setattr(session, "WAIT_S", 0.0)
    monkeypatch.setattr(session, "remember", lambda *_: None)
    monkeypatch.setattr(WorldClient, "start", lambda placement, *_: placement["world_id"])
    for _ in range(2):
        one = Session()
        monkeypatch.setattr(one, "_find_server", lambda for_world: Server())
        assert one.start_world(3, "mine") == "w1"
        assert len(set(asked)) == 1 and asked[0]
        tickets.add(asked[0])
        asked.clear()
    assert len(tickets) == 2
    assert capsys.readouterr().out.count("Waiting for free slots. others come first.") == 2


@pytest.mark.parametrize(("own", "wanted"), [(3, 3), (2, 4)])
def test_who_trades_slots_that_it_holds_has_time_to_end_what_is_there(cluster: Cluster, own: int, wanted: int) -> None:
    assert cluster.ask("mine", own)
    if wanted == own:
        assert not cluster.ask("theirs", 2)  # they wait for what is mine
    as_free = Capacity(cluster.free + own, TOTAL, cluster.held, cluster.begun)
    assert cluster.line.ask("mine-again", wanted, as_free, "new", cluster.now, trades=own).goes
    cluster.pass_time(0.75, ("theirs", 2))
    cluster.end("mine")
    cluster.pass_time(0.75, ("theirs", 2))
    assert cluster.ask("mine-again", wanted)


def test_who_trades_slots_and_needs_more_comes_after_those_who_wait_for_these(cluster: Cluster) -> None:
    assert cluster.ask("mine", 2) and cluster.ask("others", 1)
    assert not cluster.ask("theirs", 2)
    as_free = Capacity(cluster.free + 2, TOTAL, cluster.held, cluster.begun)
    told = cluster.line.ask("mine-again", 3, as_free, "new", cluster.now, trades=2)
    assert not told.goes and told.before == 2
