"""Who may lead a run next, by values: those whom the newest term names or who were told of it, and nobody else."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jupyter_llmcloud.agent.failover.follower_link import FollowerLink
from jupyter_llmcloud.agent.failover.run_leadership import RunLeadership
from jupyter_llmcloud.agent.failover.standby import LedRuns, Standby
from jupyter_llmcloud.agent.node_services import NodeServices
from jupyter_llmcloud.protocol.agent_messages import Execute, StartWorld
from jupyter_llmcloud.protocol.rank_messages import StandBy
from jupyter_llmcloud.storage.leadership import Leadership, TermClaim
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

HERE = socket.gethostname()
SPEC = StartWorld(world_id="w", agents=[{"address": "/a/agent.sock", "num_ranks": 1}])


class Node:
    """What a leader uses of its agent: nobody else is found to stand by."""

    address = "/a/agent.sock"

    def leads(self, folder: Path, wait_s: float) -> None:
        pass

    leads_no_more = leads

    async def find_standby(self) -> str:
        return ""


class Link:
    """A link to an agent that hosts ranks, until whose end (`gone`) what is sent arrives, unless it is lost on the way."""

    is_here = False

    def __init__(self, leads_until: float, arrives: Any = lambda: True) -> None:
        self.leads_until = leads_until
        self.gone = ""
        self.told: StandBy | None = None
        self._arrives = arrives

    def send(self, message: StandBy) -> None:
        if not self.gone and self._arrives():
            self.told = message

    def may_lead(self, leadership: Leadership) -> bool:
        """As agent/failover/standby decides it."""
        newest = leadership.newest()
        assert newest is not None
        return self.told is not None and (newest.term == self.told.term or self.told.heir in newest.heirs)


class Leader:
    """A run's leader over links that are not there."""

    def __init__(self, folder: Path) -> None:
        self.num_claims_wanted = 0
        node, nothing = cast(NodeServices, Node()), lambda _: None
        self.lead = RunLeadership(node, SPEC, folder, on_change=nothing, on_standby_lost=self._wants_claim)
        self.leadership = Leadership(folder)

    def _wants_claim(self) -> None:
        self.num_claims_wanted += 1

    def appoint(self, links: list[Link]) -> None:
        self.lead.standby(cast(list[FollowerLink], links))


def test_who_stands_by_does_so_from_the_next_claim_on_without_being_told(tmp_path: Path) -> None:
    async def story() -> None:
        leader, stays, lost = Leader(tmp_path), Link(20.0), Link(10.0)
        assert await leader.lead.claim()
        leader.appoint([stays, lost])
        assert leader.lead.until == 10.0
        stays._arrives = lambda: False
        lost.gone = "it was not heard for too long"
        assert await leader.lead.claim()
        assert stays.may_lead(leader.leadership), "the leader may be killed now"
        assert not lost.may_lead(leader.leadership), "the leader goes on without it"
        assert leader.lead.until == 20.0

    asyncio.run(story())


def test_who_is_not_needed_any_more_counts_until_a_term_does_not_name_it(tmp_path: Path) -> None:
    async def story() -> None:
        leader, stays, dropped = Leader(tmp_path), Link(20.0), Link(10.0)
        await leader.lead.claim()
        leader.appoint([stays, dropped])
        leader.appoint([stays])
        assert leader.lead.until == 10.0
        assert leader.num_claims_wanted == 1
        await leader.lead.claim()
        leader.appoint([stays])
        assert leader.lead.until == 20.0
        assert leader.num_claims_wanted == 1

    asyncio.run(story())


@pytest.mark.parametrize("seeds", [range(at, at + 20) for at in (0, 20, 40)], ids=str)
def test_whatever_is_lost_on_the_way_nobody_may_lead_of_whom_the_leader_does_not_know(
    seeds: range, tmp_path: Path
) -> None:
    """It goes on without a claim only up to a time at which none of those leads that could."""
    for seed in seeds:
        asyncio.run(_check_story(random.Random(seed), tmp_path / str(seed)))


async def _check_story(dice: random.Random, folder: Path) -> None:
    leader, links = Leader(folder), list[Link]()
    await leader.lead.claim()
    for _ in range(60):
        match dice.choice(["appoint", "claim", "lose", "lose", "begin"]):
            case "begin":
                links.append(Link(dice.uniform(0, 100), lambda: dice.random() < 0.7))
            case "lose":
                for link in dice.sample(links, min(1, len(links))):
                    link.gone = "gone"
            case "appoint":
                leader.appoint(dice.sample(links, dice.randint(0, len(links))))
            case "claim":
                assert await leader.lead.claim()
        heirs = [link for link in links if link.may_lead(leader.leadership)]
        until = leader.lead.until
        assert not heirs or (until is not None and until <= min(link.leads_until for link in heirs))


# --- the other end ---


@pytest.mark.parametrize(
    ("newest", "leads"),
    [
        (TermClaim(2, "/a.sock", "one"), True),
        (TermClaim(3, "/a.sock", "one", heirs=("me", "other")), True),
        (TermClaim(3, "/a.sock", "one", heirs=("other",)), False),
        (TermClaim(3, "/c.sock", "three"), False),
        (TermClaim(3), False),
    ],
    ids=["the term it was told of", "named in a later one", "left out of that", "of another leader", "ended by a Stop"],
)
def test_an_agent_that_stood_by_leads_when_the_newest_term_says_so(
    newest: TermClaim, leads: bool, tmp_path: Path
) -> None:
    led = asyncio.run(_told_of_term_2(tmp_path / "train", newest))
    assert led == ([newest.term + 1] if leads else [])
    assert (Leadership(tmp_path / "train").newest() == newest) is not leads


def test_who_cannot_read_what_is_needed_to_lead_a_run_leaves_it_to_others(tmp_path: Path) -> None:
    # Another version has written it, or half of it has come through: who reads it may lead, and nobody has claimed that.
    path, newest = tmp_path / "train", TermClaim(2, "/a.sock", "one")
    led = asyncio.run(_told_of_term_2(path, newest, b"no frame of ours"))
    assert led == [] and Leadership(path).newest() == newest


def test_an_agent_that_ends_takes_its_own_connections_end_for_nobodys(tmp_path: Path) -> None:
    # Its leader lives: a claim for the next term would depose it, and nobody would lead the run after that.
    path, newest = tmp_path / "train", TermClaim(2, "/a.sock", "one")
    led = asyncio.run(_told_of_term_2(path, newest, ends=True))
    assert led == [] and Leadership(path).newest() == newest


async def _told_of_term_2(path: Path, newest: TermClaim, written: bytes = b"", *, ends: bool = False) -> list[int]:
    cell = Execute(world_id="w", run_id="train", name="train", code="", max_restarts=1)
    RunFolder(path).create(RunRecord("train", "train", "running", ranks=[0]), "")
    leadership, led = Leadership(path), list[int]()
    leadership.save(SPEC, cell, [])
    leadership.claim(newest)
    if written:
        (path / "restart.bin").write_bytes(written)

    async def lead_on(*about: Any) -> None:
        led.append(about[-1])

    standby = Standby("/b.sock", cast(LedRuns, SimpleNamespace()), lead_on)
    if ends:
        standby.close()
    standby.expect(StandBy(folder=str(path), term=2, heir="me"), asyncio.get_running_loop().time())
    await asyncio.wait_for(_none_waiting(standby), 20)
    return led


async def _none_waiting(standby: Standby) -> None:
    while standby._tasks:
        await asyncio.wait(standby._tasks)
