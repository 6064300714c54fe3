"""A world over two node agents, as over two hosts: the first leads, the second follows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from jupyter_llmcloud.errors import ConnectionLost, WorldError
from tests.support.worlds import AgentProcess, Ranks, alive, family, until

SUM = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nint(t)"


@pytest.fixture(scope="module")
def wide(node_agent: AgentProcess, follower: AgentProcess) -> Iterator[Ranks]:
    """Two ranks on the leading node_agent, one on the following."""
    ranks = Ranks(node_agent, 3, shares=[(node_agent, 2), (follower, 1)])
    yield ranks
    ranks.end()


def test_ranks_are_on_both_agents_and_one_group(wide: Ranks, follower: AgentProcess) -> None:
    outcome = wide.ok("import os\nprint(os.environ['LOCAL_RANK'], os.environ['LOCAL_WORLD_SIZE'])\n" + SUM)
    assert outcome.results() == ["3", "3", "3"]
    assert [outcome.text(rank) for rank in range(3)] == ["0 2\n", "1 2\n", "0 1\n"]


def test_variables_reach_and_leave_ranks_of_the_follower(wide: Ranks) -> None:
    wide.push(there=[1, 2, 3])
    wide.ok("there = [rank, *there]")
    assert wide.pull("there", 2) == [2, 1, 2, 3]


def test_everything_the_follower_wrote_is_there_when_the_cell_ends(wide: Ranks) -> None:
    for number in range(10):
        outcome = wide.ok(f"import os\nrun.log(x={number})\nprint('printed')\nos.write(1, b'low level {number}\\n')")
        for rank in range(3):
            assert "printed" in outcome.text(rank)
            assert f"low level {number}\n" in outcome.text(rank)
            assert outcome.values("x", rank) == [float(number)]


@pytest.mark.alone
def test_a_failure_on_the_follower_lets_the_leader_go(wide: Ranks) -> None:
    outcome = wide.run("import torch.distributed as dist\nif rank == 2: raise KeyError('far')\ndist.barrier()")
    assert (outcome.state, outcome.error["rank"], outcome.error["ename"]) == ("failed", 2, "KeyError")
    assert outcome.seconds < 2
    assert wide.ok(SUM).results() == ["3"] * 3


@pytest.mark.alone
def test_stop_reaches_the_follower(wide: Ranks) -> None:
    running = wide.send("import time\nprint('in it')\nkept = rank\nwhile True: time.sleep(0.01)")
    outcome = running.wait_for("in it", times=3).stop().end()
    assert outcome.state == "stopped"
    assert outcome.seconds < 2
    assert wide.ok("kept").results() == ["0", "1", "2"]


def test_a_killed_rank_of_the_follower_is_named_and_replaced(wide: Ranks) -> None:
    outcome = wide.run("import os, signal\nif rank == 2: os.kill(os.getpid(), signal.SIGKILL)\n" + SUM)
    assert outcome.error["rank"] == 2
    assert "SIGKILL" in outcome.error["evalue"]
    assert wide.ok(SUM).results() == ["3"] * 3


def test_a_rank_that_must_be_killed_is_killed_there_too(wide: Ranks) -> None:
    running = wide.send(
        """
        import ctypes, time
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        print("in it")
        if rank == 2:
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        time.sleep(100)
        """
    )
    outcome = running.wait_for("in it", times=3).stop(presses=4).end()
    assert outcome.state == "stopped"
    assert wide.ok(SUM).results() == ["3"] * 3


def test_the_ranks_of_the_follower_end_with_the_world(node_agent: AgentProcess, follower: AgentProcess) -> None:
    ranks = Ranks(node_agent, 2, shares=[(node_agent, 1), (follower, 1)])
    pids = ranks.pids()
    ranks.end()
    until(lambda: not any(map(alive, pids)), "both ranks have ended", 5)


def test_a_killed_follower_fails_the_cell_and_the_next_finds_its_rank_elsewhere(node_agent: AgentProcess) -> None:
    other = AgentProcess()
    try:
        ranks = Ranks(node_agent, 2, shares=[(node_agent, 1), (other, 1)])
        running = ranks.send("import time\nprint('in it')\nif rank: time.sleep(100)\n" + SUM)
        running.wait_for("in it", times=2)
        os.kill(other.process.pid, signal.SIGKILL)
        outcome = running.end(10)
        assert (outcome.state, outcome.error["rank"]) == ("failed", 1)
        assert "agent" in outcome.error["evalue"]
        outcome = ranks.ok(SUM)
        assert outcome.results() == ["2", "2"]
        assert any("rank 1 moved to" in row.detail for row in outcome.states)
        assert [row["state"] for row in ranks.describe()["ranks"]] == ["idle", "idle"]
        ranks.end()
    finally:
        other.end()


def test_a_rank_that_ends_before_it_has_joined_fails_the_start_at_once(node_agent: AgentProcess) -> None:
    began = time.monotonic()
    with pytest.raises(WorldError, match="could not join"):
        Ranks(node_agent, 2, env={"NO_ENVIRONMENT": "can hold \0"})
    assert time.monotonic() - began < 20


def test_no_rank_outlives_a_killed_leader_here_or_on_the_follower(follower: AgentProcess) -> None:
    leader = AgentProcess()
    try:
        ranks = Ranks(leader, 2, shares=[(leader, 1), (follower, 1)])
        running = ranks.send("import time\nprint('in it')\ntime.sleep(100)").wait_for("in it", times=2)
        everybody = {*family(leader.process.pid), *ranks.pids()}
        os.kill(leader.process.pid, signal.SIGKILL)
        leader.process.wait()
        with pytest.raises(ConnectionLost):
            running.end(10)
        until(lambda: not any(map(alive, everybody)), "no process is left", 5)
        ranks.channel.close()
    finally:
        leader.end()
