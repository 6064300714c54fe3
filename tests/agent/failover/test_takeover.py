"""A run with restarts whose leading agent is killed or cut off goes on under another one, and under one only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.agent.runs.supervisor import RunSupervisor
from jupyter_llmcloud.core.scheduling.lease_link import TAKES_OVER
from jupyter_llmcloud.errors import ConnectionLost
from jupyter_llmcloud.protocol.agent_messages import (
    Describe,
    Execute,
    FindStandby,
    Placement,
    PlaceRanks,
    RenewLease,
    StandbyFound,
    StopRun,
)
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.protocol.frames import Message
from jupyter_llmcloud.protocol.rpc import Responder
from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.leadership import Leadership, TermClaim
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from tests.support.cables import Cable
from tests.support.resuming import cell, results, same
from tests.support.worlds import AgentElsewhere, AgentProcess, Ranks, alive, until

pytestmark = pytest.mark.slow

LEASE_S = 4.0
RESTARTS: dict[str, Any] = {"checkpoint_every": 4, "max_restarts": 3}
WAITS = cell("accelerate", 25).replace(
    "os.kill(os.getpid(), signal.SIGKILL)", "print('here', flush=True); signal.pause()"
)
# Ranks that never wait for each other: whoever is not ended goes on for ever.
ALONE = """ENDS = True
import os, time
attempt = len(list(run.folder.glob(f"began-{rank}-*")))
(run.folder / f"began-{rank}-{attempt}").touch()
print("here", flush=True)
for step in range(100 if attempt and ENDS else 10**9):
    run.log(attempt=attempt, t=time.time())
    time.sleep(0.02)
"""


@pytest.fixture
def make_agent() -> Iterator[Callable[..., AgentProcess]]:
    """Makes agents that end with the test, those that stand still, too."""
    agents: list[AgentProcess] = []

    def make(**options: Any) -> AgentProcess:
        agents.append(AgentProcess(**options))
        return agents[-1]

    yield make
    for agent in agents:
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent.process.pid, signal.SIGCONT)
    said = "".join(agent.words() for agent in agents)
    for agent in agents:
        agent.end()
    assert "Traceback" not in said, said


class Worker:
    """Holds an agent as the plugin of a Dask worker does, and knows one other agent.

    `places`: the agents that it names for ranks, one after the other; the last one for all further ones.
    """

    def __init__(self, agent: AgentProcess, other: AgentProcess) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.asked: list[Message] = []
        self.places: list[AgentProcess] = []
        self._other = other
        self._connection: AgentConnection = self._do(self._hold(agent))

    async def _hold(self, agent: AgentProcess) -> AgentConnection:
        responder = Responder("the worker")
        responder.on(FindStandby, self._answer)
        responder.on(PlaceRanks, self._place)
        connection = await AgentConnection.open(agent.address, responder=responder)
        await connection.request(RenewLease(finds_capacity=True))
        return connection

    async def _answer(self, question: FindStandby) -> StandbyFound:
        self.asked.append(question)
        return StandbyFound(address=self._other.address)

    async def _place(self, question: PlaceRanks) -> Placement:
        address = (self.places.pop(0) if len(self.places) > 1 else self.places[0]).address
        slots = {"address": address, "home": address, "num_ranks": question.num_ranks, "host": socket.gethostname()}
        return Placement(agents=[slots])

    def _do(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(20)

    def end(self) -> None:
        self._do(self._connection.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def finished(folder: RunFolder, timeout_s: float = 60.0) -> Any:
    """The record of a run that goes on without us, once it has ended well."""
    until(lambda: not folder.read().is_active, "the run has ended", timeout_s)
    record = folder.read()
    assert record.state == "finished", (record.errors, record.history)
    return record


def words(record: Any) -> str:
    return "\n".join(entry["why"] for entry in record.history if "why" in entry)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_follower_goes_on_with_the_run_of_a_lost_leader_to_the_same_weights(
    node_agent: AgentProcess, make_agent: Callable[..., AgentProcess], number: int
) -> None:
    """Killed, or told to end by a batch system that takes its place away, and given up when its ranks save nothing."""
    leader = make_agent(env={"LLMCLOUD_LEAVE_S": "2"})
    ranks = Ranks(leader, 2, shares=[(leader, 1), (node_agent, 1)])
    ranks.ok("import torch\ndef unused(): pass", is_definition=True)
    ranks.ok(cell("accelerate"))
    wanted = results(ranks)
    running = ranks.send(WAITS, **RESTARTS).wait_for("here")
    pids, folder = ranks.pids(), running.outcome.folder
    os.kill(leader.process.pid, number)
    record = finished(folder)
    assert not any(map(alive, pids))
    assert "the agent that led the run was lost; resumed from step" in words(record)
    assert "1 definition cells were run on them again" in words(record)
    # A place that a batch system takes away costs none of the restarts that are meant for faults.
    num_restarts = 1 if number == signal.SIGKILL else 0
    assert (record.agent, record.num_restarts) == (node_agent.address, num_restarts)
    for rank in (0, 1):
        seen = [row["seq"] for row in read_all(folder.metrics(rank))]
        assert seen == list(range(1, len(seen) + 1))
    mine = ranks.beside(node_agent)
    assert all(same(*pair) for pair in zip(wanted, results(mine), strict=True))
    assert not Leadership(folder.path).can_be_taken
    mine.end()


def test_an_agent_without_any_rank_stands_by_for_a_run_that_is_all_on_one_host(
    node_agent: AgentProcess, make_agent: Callable[..., AgentProcess]
) -> None:
    """And when the one that stands by is lost instead, the run is not disturbed and another one is asked for."""
    leader, first = make_agent(), make_agent()
    worker = Worker(leader, first)
    ranks = Ranks(leader, 2)
    running = ranks.send(ALONE, max_restarts=2).wait_for("here", times=2)
    folder, pids = running.outcome.folder, ranks.pids()
    until(lambda: worker.asked, "an agent to stand by is asked for")
    worker._other = node_agent
    first.process.kill()
    until(lambda: len(worker.asked) == 2, "another one is asked for")
    assert Leadership(folder.path).newest() == TermClaim(1, leader.address, socket.gethostname())
    assert ranks.pids() == pids
    assert folder.read().num_restarts == 0
    until(lambda: folder.run_id in _described(node_agent)["stands_by"], "it stands by")
    leader.process.kill()
    record = finished(folder)
    assert (record.agent, record.num_restarts) == (node_agent.address, 1)
    worker.end()
    ranks.beside(node_agent).end()


def test_an_elastic_run_is_not_charged_for_a_place_that_has_gone_before_it_got_ranks_there(
    make_agent: Callable[..., AgentProcess],
) -> None:
    """The cluster names the agent that has just gone for a while."""
    leader, other = make_agent(), make_agent()
    workers = Worker(leader, other), Worker(other, leader)
    workers[1].places = [leader, other]
    ranks = Ranks(leader, 2)
    folder = ranks.send(ALONE, elastic="1:2", max_restarts=1).wait_for("here", times=2).outcome.folder
    until(lambda: folder.run_id in _described(other)["stands_by"], "it stands by")
    leader.process.kill()
    record = finished(folder)
    assert (record.agent, record.num_restarts) == (other.address, 0)
    assert "waits for capacity: The node agent" in words(record)
    for worker in workers:
        worker.end()
    ranks.beside(other).end()


def test_the_agent_that_takes_a_killed_ones_place_goes_on_with_its_run(
    make_agent: Callable[..., AgentProcess],
) -> None:
    """All on one host, nobody else there: what a worker's plugin does when its agent is killed.

    Had its host given notice, no restart is used up, although nobody could lead meanwhile.
    """
    leader = make_agent()
    ranks = Ranks(leader, 2)
    ranks.ok(cell("accelerate"))
    wanted = results(ranks)
    running = ranks.send(WAITS, **RESTARTS).wait_for("here")
    plain = Ranks(leader, 1)
    lost = plain.send("print('here')\nimport time\ntime.sleep(100)").wait_for("here")
    leader.process.send_signal(signal.SIGUSR1)
    until(lambda: [*running.outcome.folder.path.glob("terms/*.left")], "the notice is written down")
    leader.process.kill()
    leader.process.wait()
    (leader.folder / "agent.json").unlink()
    successor = make_agent(folder=leader.folder)
    record = finished(running.outcome.folder)
    assert (record.num_restarts, record.num_resizes) == (0, 1)
    assert lost.outcome.folder.read().is_active, "nobody has executed again what was not to be"
    mine = ranks.beside(successor)
    assert all(same(*pair) for pair in zip(wanted, results(mine), strict=True))
    with pytest.raises(ConnectionLost):
        ranks.describe()
    mine.end()


def test_a_leader_that_is_killed_while_it_heals_is_followed_by_who_stood_by_before(
    node_agent: AgentProcess, make_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """It has claimed a new term, and nobody takes its place there: its host is lost."""
    leader, held = make_agent(), tmp_path / "held"
    ranks = Ranks(leader, 3, shares=[(leader, 2), (node_agent, 1)])
    waits = f"import os, time\nwhile os.path.exists({str(held)!r}):\n    time.sleep(0.02)\ndef unused(): pass"
    ranks.ok(waits, is_definition=True)  # which is executed again on a rank that is new
    running = ranks.send(ALONE, max_restarts=3).wait_for("here", times=3)
    folder, leadership = running.outcome.folder, Leadership(running.outcome.folder.path)
    held.touch()
    os.kill(ranks.pids()[1], signal.SIGKILL)
    until(lambda: (newest := leadership.newest()) is not None and newest.term == 1, "the leader has claimed anew")
    leader.process.kill()
    held.unlink()
    record = finished(folder)
    assert (record.agent, record.num_restarts) == (node_agent.address, 1)
    ranks.beside(node_agent).end()


def test_a_leader_that_stands_still_has_no_rank_left_when_another_one_leads(
    node_agent: AgentProcess, make_agent: Callable[..., AgentProcess]
) -> None:
    """SIGSTOP: its connections stay open. Awake again it writes nothing more, and ends what it had."""
    leader = make_agent()
    ranks = Ranks(leader, 2, shares=[(leader, 1), (node_agent, 1)], link_lease_s=LEASE_S)
    running = ranks.send(ALONE, max_restarts=1).wait_for("here", times=2)
    pids, folder = ranks.pids(), running.outcome.folder
    # "here" comes before the first record, and what is compared below are the records of both attempts.
    until(lambda: all(list(read_all(folder.metrics(rank))) for rank in (0, 1)), "both have logged", 60)
    os.kill(leader.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: folder.read().num_restarts, "another agent leads it", 60)
    assert time.monotonic() - began > TAKES_OVER * LEASE_S - 1.5
    assert not any(map(alive, pids))
    os.kill(leader.process.pid, signal.SIGCONT)
    record = finished(folder)
    assert record.agent == node_agent.address
    until(lambda: _described(leader)["worlds"] == [], "it has given its world up")
    for rank in (0, 1):
        times: dict[int, list[float]] = {0: [], 1: []}
        for row in read_all(folder.metrics(rank)):
            times[int(row["values"]["attempt"])].append(row["values"]["t"])
        assert max(times[0]) < min(times[1]), "two copies"
    assert record.history == folder.read().history
    ranks.beside(node_agent).end()


def _described(agent: AgentProcess) -> dict[str, Any]:
    with contextlib.closing(agent.channel()) as channel:
        return channel.request(Describe()).as_dict()


def test_a_leader_cut_off_from_its_follower_goes_on_itself_and_the_follower_does_not(
    node_agent: AgentProcess, follower: AgentProcess, tmp_path: Path
) -> None:
    """Nothing comes through in either direction, and both see the run's folder: the leader is first, for certain."""
    with Cable(follower.address, tmp_path) as cable:
        shares = [(node_agent, 1), (AgentElsewhere(cable.path), 1)]
        ranks = Ranks(node_agent, 2, shares=shares, link_lease_s=LEASE_S)
        running = ranks.send(ALONE, max_restarts=3).wait_for("here", times=2)
        pids, folder = ranks.pids(), running.outcome.folder
        cable.dropping = True
        began = time.monotonic()
        record = finished(folder)
        assert record.agent == node_agent.address
        assert running.end().state == "finished"
        assert not alive(pids[1])
        until(lambda: time.monotonic() > began + TAKES_OVER * LEASE_S + 1, "the follower would lead now")
        assert _described(follower)["worlds"] == []
        assert folder.read().history == record.history
    ranks.end()


def test_a_stop_between_two_leaders_is_heard_by_the_second(
    make_agent: Callable[..., AgentProcess], node_agent: AgentProcess
) -> None:
    leader = make_agent()
    ranks = Ranks(leader, 2, shares=[(leader, 1), (node_agent, 1)])
    running = ranks.send(ALONE.replace("ENDS = True", "ENDS = False"), max_restarts=9).wait_for("here", times=2)
    leader.process.kill()
    folder = running.outcome.folder
    until(lambda: folder.read().agent == node_agent.address, "another agent leads it")
    with contextlib.closing(node_agent.channel()) as channel:
        channel.request(StopRun(run_id=folder.run_id))
    until(lambda: folder.read().state == "stopped", "it is stopped", 8)
    ranks.beside(node_agent).end()


def test_a_run_that_has_used_up_its_restarts_is_lost_with_its_leader(
    make_agent: Callable[..., AgentProcess], node_agent: AgentProcess
) -> None:
    leader = make_agent()
    ranks = Ranks(leader, 2, shares=[(leader, 1), (node_agent, 1)])
    dies = "import signal\nif rank and not attempt: os.kill(os.getpid(), signal.SIGKILL)\nprint('here'"
    code = ALONE.replace("ENDS = True", "ENDS = False").replace('print("here"', dies)
    running = ranks.send(code, max_restarts=1).wait_for("here", times=3)
    leader.process.kill()
    folder = running.outcome.folder
    until(lambda: not folder.read().is_active, "the run has ended")
    record = folder.read()
    assert record.state == "lost"
    assert "all 1 restarts are used up" in words(record)


def test_a_run_that_was_ended_after_it_was_claimed_stays_ended(tmp_path: Path) -> None:
    """Stop finds nobody who leads it, and ends it, before the one that has claimed it has written so."""

    async def taken_over() -> str:
        folder = RunFolder(tmp_path / "train")
        cell = Execute(
            world_id="w", run_id="train", name="train", code="", ranks=[0], max_restarts=1, folder=str(folder.path)
        )
        folder.create(RunRecord("train", "train", "stopped", ended=1.0, ranks=[0]), "")
        lead = SimpleNamespace(is_over=True, was_left=False, until=None, end=lambda: None)
        world = SimpleNamespace(links={})
        record = RunRecord("train", "train", "running", ranks=[0], agent="b.sock")
        run = RunSupervisor(cell, record, folder, world, lambda on_standby_lost: lead)  # type: ignore[arg-type]
        run.take_over()
        await asyncio.wait_for(run.ended, 10)
        assert not run.is_recorded
        return folder.read().state

    assert asyncio.run(taken_over()) == "stopped"
