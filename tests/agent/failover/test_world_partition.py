"""A leader and a follower that do not hear each other: for a moment, and for good."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_llmcloud.protocol.agent_messages import Describe
from tests.support.cables import Cable
from tests.support.resuming import cell, results, resumed, same
from tests.support.worlds import AgentElsewhere, AgentProcess, Ranks, alive, until

SUM = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nint(t)"
LEASE_S = 4.0
NOTICED_S = 1.25 * LEASE_S + 3.0
COUNTS = """
import time
for i in range(300):
    print("line", i, flush=True)
    run.log(x=i)
    time.sleep(0.01)
"""


@pytest.fixture
def cable(follower: AgentProcess, tmp_path: Path) -> Iterator[Cable]:
    with Cable(follower.address, tmp_path) as cable:
        yield cable


def _world(leader: AgentProcess, cable: Cable) -> Ranks:
    return Ranks(leader, 2, shares=[(leader, 1), (AgentElsewhere(cable.path), 1)], link_lease_s=LEASE_S)  # type: ignore[list-item]


def test_a_connection_that_breaks_and_comes_back_loses_nothing(node_agent: AgentProcess, cable: Cable) -> None:
    """The ranks are the same processes, and every line and metric is there, once and in order."""
    ranks = _world(node_agent, cable)
    pids = ranks.pids()
    running = ranks.send(COUNTS).wait_for("line 20\n", times=2)
    for number in (1, 2):
        cable.cut()
        written = running.outcome.folder.metrics(0)
        size = written.stat().st_size
        until(lambda written=written, size=size: written.stat().st_size > size + 2000, "training goes on meanwhile")
        cable.mend()
        running.wait_for(f"line {number * 80}\n", times=2)
    outcome = running.end()
    assert outcome.state == "finished"
    wanted = "".join(f"line {i}\n" for i in range(300))
    assert [outcome.text(rank) for rank in (0, 1)] == [wanted, wanted]
    assert [outcome.values("x", rank) for rank in (0, 1)] == [[float(i) for i in range(300)]] * 2
    assert ranks.pids() == pids
    assert ranks.ok(SUM).results() == ["2", "2"]
    ranks.end()
    until(lambda: not any(map(alive, pids)), "both ranks have ended", 5)


def test_when_nothing_comes_through_both_sides_let_go_in_time(node_agent: AgentProcess, cable: Cable) -> None:
    """The connection stays open. The survivor keeps its variables; the other side's rank ends by its own lease."""
    ranks = _world(node_agent, cable)
    pids = ranks.pids()
    running = ranks.send(f"kept = rank\nprint('in it')\nimport time\nif rank: time.sleep(100)\n{SUM}")
    running.wait_for("in it", times=2)
    cable.dropping = True
    began = time.monotonic()
    outcome = running.end()
    assert outcome.state == "failed"
    assert time.monotonic() - began < NOTICED_S
    assert not alive(pids[1]), "a rank whose leader may have started another copy"
    assert "has gone: it was not heard for too long" in outcome.error["evalue"]
    assert "rank 0: released" in outcome.report
    cable.dropping = False
    assert ranks.ok("kept if rank == 0 else 'new'").results() == ["0", "'new'"]
    assert ranks.ok(SUM).results() == ["2", "2"]
    ranks.end()


def test_a_following_agent_that_stands_still_is_noticed_and_its_rank_ends(
    node_agent: AgentProcess, request: pytest.FixtureRequest
) -> None:
    """SIGSTOP: it accepts connections and closes none, and it cannot end its rank. That ends by itself."""
    other = AgentProcess()
    request.addfinalizer(other.end)
    ranks = Ranks(node_agent, 2, shares=[(node_agent, 1), (other, 1)], link_lease_s=LEASE_S)
    request.addfinalizer(ranks.end)
    pids = ranks.pids()
    running = ranks.send("print('in it')\nimport time\nwhile True: time.sleep(0.01)").wait_for("in it", times=2)
    os.kill(other.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        outcome = running.end()
        assert (outcome.state, outcome.error["rank"]) == ("failed", 1)
        assert time.monotonic() - began < NOTICED_S
        assert not alive(pids[1])
        assert ranks.ok(SUM).results() == ["2", "2"]
    finally:
        os.kill(other.process.pid, signal.SIGCONT)
    channel = other.channel()
    described = channel.request(Describe()).as_dict()
    assert described["free_slots"] == described["num_slots"]
    channel.close()
    assert "Traceback" not in other.words(), other.words()


def test_a_run_that_loses_its_following_agent_goes_on_where_there_is_room(
    node_agent: AgentProcess, request: pytest.FixtureRequest
) -> None:
    """SIGKILL to the agent in the middle of training: the weights are those of an undisturbed run."""
    other = AgentProcess()
    request.addfinalizer(other.end)
    ranks = Ranks(node_agent, 2, shares=[(node_agent, 1), (other, 1)])
    request.addfinalizer(ranks.end)
    ranks.ok(cell("accelerate"))
    wanted = results(ranks)
    waits = "print('at the place', flush=True); signal.pause()"
    code = cell("accelerate", 25).replace("os.kill(os.getpid(), signal.SIGKILL)", waits)
    running = ranks.send(code, checkpoint_every=4, max_restarts=1).wait_for("at the place")
    os.kill(other.process.pid, signal.SIGKILL)
    outcome = running.end()
    assert outcome.state == "finished", outcome.ended.errors
    [note] = resumed(outcome)
    assert "rank 1 was lost" in note
    assert "resumed from step" in note
    assert all(same(*pair) for pair in zip(wanted, results(ranks), strict=True))
