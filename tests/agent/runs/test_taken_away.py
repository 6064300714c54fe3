"""A batch system takes a place away: SIGTERM to every process there, SIGKILL half a minute later."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from tests.support.resuming import cell, results, same
from tests.support.worlds import AgentProcess, Ranks, Running, alive, family, until

pytestmark = pytest.mark.slow

SLOW = (
    cell("accelerate")
    .replace("shuffle=True)", "shuffle=True, num_workers=WORKERS)")
    .replace("turn += 1\n", "turn += 1\n        time.sleep(PAUSE)\n        print('turn', turn, flush=True)\n")
)
RARELY = 1000  # steps: more than there are


def take_away(agent: AgentProcess, first: list[int], after_s: float = 0.0) -> None:
    """SIGTERM to all processes, to some of them a while before."""
    everybody = family(agent.process.pid)
    for pid in [*first, *[pid for pid in everybody if pid not in first]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if pid in first:
            time.sleep(after_s)
    assert agent.process.wait(25) == 0
    until(lambda: not any(map(alive, everybody)), "nothing is left", 10)


def newest_step(running: Running) -> int:
    found, _ = CheckpointFolder(running.outcome.folder.path / "checkpoints").newest(True)
    return found.step if found is not None else -1


def loader_workers(ranks: Ranks) -> list[int]:
    return [child.pid for pid in ranks.pids() for child in psutil.Process(pid).children(recursive=True)]


def test_a_run_saves_its_step_before_it_ends_and_goes_on_from_there_to_the_same_weights(
    own_agent: Callable[..., AgentProcess], node_agent: AgentProcess
) -> None:
    """Also when the workers of its loaders are told first. Runs without any save their step below."""
    undisturbed = Ranks(node_agent)
    undisturbed.ok(f"WORKERS, PAUSE = 2, 0\n{SLOW}")
    wanted = results(undisturbed)

    agent = own_agent()
    ranks = Ranks(agent)
    code = f"WORKERS, PAUSE = 2, 0.2\n{SLOW}"
    running = ranks.send(code, checkpoint_every=RARELY).wait_for("turn 15")  # every second turn makes a step
    assert newest_step(running) == -1
    take_away(agent, first=loader_workers(ranks))
    assert 7 <= newest_step(running) <= 12
    record = running.outcome.folder.read()
    assert record.state == "failed" and "told to end (SIGTERM)" in record.errors[0]["evalue"]
    assert any("a checkpoint of step" in str(entry.get("why")) for entry in record.history)

    again = Ranks(node_agent)
    step = newest_step(running)
    resume = {"folder": str(running.outcome.folder.path / "checkpoints" / f"step-{step}"), "step": step}
    shown = again.ok(code.replace("0.2", "0", 1), resume=resume)
    assert "turn 12\n" not in shown.text()
    assert all(same(*pair) for pair in zip(wanted, results(again), strict=True))
    undisturbed.end()
    again.end()


def test_a_run_that_cannot_save_ends_at_once(own_agent: Callable[..., AgentProcess]) -> None:
    agent = own_agent()
    running = Ranks(agent).send("import time\nprint('here', flush=True)\ntime.sleep(60)").wait_for("here", times=2)
    began = time.monotonic()
    take_away(agent, first=[])
    assert time.monotonic() - began < 10
    assert running.outcome.folder.read().state == "failed"


def test_a_rank_that_is_told_to_end_alone_does_and_its_subprocesses_do(world: Ranks) -> None:
    code = """
    import multiprocessing, subprocess, time
    child = subprocess.Popen(["sleep", "60"])
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    forked.start()
    began = time.monotonic()
    child.terminate(); forked.terminate()
    child.wait(); forked.join()
    time.monotonic() - began < 5, child.returncode, forked.exitcode
    """
    assert world.ok(code).results() == ["(True, -15, -15)"] * 2
    running = world.send("import time\nprint('here', flush=True)\ntime.sleep(60)").wait_for("here", times=2)
    os.kill(world.pids()[1], signal.SIGTERM)
    ended = running.end(15)
    assert ended.state == "failed"
    assert (ended.error["rank"], ended.error["ename"]) == (1, "RankKilled")
    assert "SIGTERM" in ended.error["evalue"]


@pytest.mark.parametrize("taken", ["the follower", "both"])
def test_a_run_over_two_agents_saves_its_step_also_when_one_of_them_only_hosts_ranks(
    own_agent: Callable[..., AgentProcess], node_agent: AgentProcess, taken: str
) -> None:
    leader, follower = own_agent() if taken == "both" else node_agent, own_agent()
    ranks = Ranks(leader, 2, shares=[(leader, 1), (follower, 1)])
    running = ranks.send(f"WORKERS, PAUSE = 0, 0.2\n{SLOW}", checkpoint_every=RARELY).wait_for("turn 15")
    began = time.monotonic()
    for agent in [follower, leader] if taken == "both" else [follower]:
        for pid in family(agent.process.pid):
            os.kill(pid, signal.SIGTERM)
    assert follower.process.wait(15) == 0
    if taken == "both":
        assert leader.process.wait(15) == 0
    until(lambda: not running.outcome.folder.read().is_active, "the run has ended")
    assert time.monotonic() - began < 10
    assert 7 <= newest_step(running) <= 12
    ranks.end()
