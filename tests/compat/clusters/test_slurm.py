"""Kind slurm against a real slurmctld and slurmd: worlds on its jobs, and the end of their walltime."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from tests.agent.world.test_world_two_hosts import SUM
from tests.support.clusters import Server
from tests.support.resuming import cell, results, same
from tests.support.slurm import Slurm, slurm
from tests.support.worlds import AgentElsewhere, until

pytest.importorskip("dask_jobqueue", reason="pip install dask-jobqueue")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Slurm counts walltimes in whole minutes.
OPTIONS = {
    "cores": 1, "processes": 1, "memory": "1GB", "walltime": "00:01:00", "interface": "lo", "slots": 1,
    "scheduler_options": {"interface": "lo", "dashboard_address": "127.0.0.1:0"},
}  # fmt: skip


@pytest.fixture(scope="module")
def batch_system() -> Iterator[Slurm]:
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        pytest.MonkeyPatch.context() as patch,
        slurm(Path(folder)) as running,
    ):
        patch.setenv("SLURM_CONF", str(running.folder / "slurm.conf"))
        # What is forked of another process belongs to that one's control group, and ends with another job.
        patch.delenv("LLMCLOUD_TEST_PRELOADED", raising=False)
        yield running


# Whether a signal reaches the ranks themselves depends on how Slurm tracks processes; the agent tells them in any case.
WAITS = """
        print('at work', flush=True)
        while not (run.folder / 'its-time-is-over').exists():
            time.sleep(0.01)
"""


def waiting(turn: int) -> str:
    """The cell, which waits in a turn that is no checkpoint, and trains on when it is told that its job's time is over.

    It waits once: whoever goes on with it finds the file.
    """
    code = cell("accelerate", turn).replace("        os.kill(os.getpid(), signal.SIGKILL)", WAITS.strip("\n"))
    return code.replace("victim=1", "victim=0")


def until_its_time_is_over(batch_system: Slurm, job: str, folder: RunFolder) -> None:
    """Wait for the end of a job's walltime, and have the cell that waits for that train on."""
    until(lambda: batch_system.states()[job] in {"COMPLETING", "TIMEOUT"}, "the walltime of the job ends", 150)
    (folder.path / "its-time-is-over").touch()


def has_no_agents(server: Server) -> bool:
    """Whoever asks in the moment in which the only one goes is told so."""
    try:
        return not server.agents()
    except LLMCloudError:
        return False


def resumed_step(record: RunRecord) -> int:
    """The one from which a run went on."""
    [why] = [entry["why"] for entry in record.history if "resumed from step" in entry.get("why", "")]
    return int(re.search(r"resumed from step (\d+)", why)[1])  # type: ignore[index]


def test_a_run_saves_at_the_end_of_its_walltime_and_goes_on_in_another_job_to_the_same_weights(
    batch_system: Slurm, server: Server, tmp_path: Path
) -> None:
    options = {**OPTIONS, "log_directory": str(tmp_path), "local_directory": str(tmp_path)}
    server.do(server.pool.start("slurm", "batch", 1, options))
    until(lambda: len(server.agents()) == 1, "the first job runs", 60)
    [first_job] = batch_system.running()
    world = server.world(1, link_lease_s=10.0)
    assert world.ok(SUM).results() == ["1"]
    world.ok(cell("accelerate"))
    [wanted] = results(world)

    server.do(server.pool.scale("batch", 2))
    until(lambda: len(server.agents()) == 2, "the second job runs", 60)
    [second_job] = batch_system.running() - {first_job}
    # Slurm looks every half minute whose time is over: it would end both at once.
    batch_system.ask("scontrol", "update", f"JobId={second_job}", "TimeLimit=10")
    first = next(agent for agent in server.agents() if not agent.free_slots)
    running = world.send(waiting(25), checkpoint_every=4, max_restarts=3).wait_for("at work")
    began, folder = time.monotonic(), running.outcome.folder
    until_its_time_is_over(batch_system, first_job, folder)
    until(lambda: not folder.read().is_active, "the run has ended", 60)
    record = folder.read()
    assert record.state == "finished", record.errors
    print(f"finished {time.monotonic() - began:.0f} s after it came to wait; {record.history}")
    assert record.num_restarts == 0, "a walltime that ends uses up no restart"
    assert resumed_step(record) % 4, "the newest checkpoint was a regular one: nothing was saved at the end"
    [leader] = [agent for agent in server.agents() if agent.worlds]
    assert leader.name != first.name
    [result] = results(world.beside(AgentElsewhere(leader.address)))
    assert same(wanted, result)
    world.channel.close()
    server.do(server.pool.stop("batch"))


def test_a_run_whose_only_job_has_ended_goes_on_when_the_cluster_is_given_another_one(
    batch_system: Slurm, server: Server, tmp_path: Path
) -> None:
    options = {**OPTIONS, "log_directory": str(tmp_path), "local_directory": str(tmp_path)}
    server.do(server.pool.start("slurm", "alone", 1, options))
    until(lambda: len(server.agents()) == 1, "the job runs", 60)
    [job] = batch_system.running()
    world = server.world(1, link_lease_s=10.0)
    world.ok(cell("accelerate"))
    [wanted] = results(world)
    running = world.send(waiting(25), checkpoint_every=4, max_restarts=3).wait_for("at work")
    folder = running.outcome.folder
    until_its_time_is_over(batch_system, job, folder)
    until(lambda: has_no_agents(server), "the agent has gone", 60)
    assert folder.read().is_active
    server.do(server.pool.scale("alone", 1))
    # Dask counts a lost worker for two minutes, since it may be one that cannot be reached at present.
    until(lambda: not folder.read().is_active, "the run has ended", 240)
    record = folder.read()
    assert record.state == "finished", record.errors
    assert record.num_restarts == 0, "a walltime that ends uses up no restart"
    assert resumed_step(record) % 4, "the newest checkpoint was a regular one: nothing was saved at the end"
    [leader] = [agent for agent in server.agents() if agent.worlds]
    [result] = results(world.beside(AgentElsewhere(leader.address)))
    assert same(wanted, result)
    world.channel.close()
    server.do(server.pool.stop("alone"))


@pytest.mark.parametrize("words", ["scancel", "scancel --batch --signal=USR1", "scontrol requeue"])
def test_a_run_whose_job_is_taken_away_saves_first_and_uses_up_no_restart(
    batch_system: Slurm, server: Server, tmp_path: Path, words: str
) -> None:
    options = {**OPTIONS, "walltime": "00:10:00", "log_directory": str(tmp_path), "local_directory": str(tmp_path)}
    server.do(server.pool.start("slurm", "taken", 1, options))
    until(lambda: len(server.agents()) == 1, "the job runs", 60)
    [job] = batch_system.running()
    world = server.world(1, link_lease_s=10.0)
    world.ok(cell("accelerate"))
    [wanted] = results(world)
    server.do(server.pool.scale("taken", 2))
    # Its step takes longer than Slurm leaves to what a script that has ended has started.
    code = cell("accelerate", 25).replace("os.kill(os.getpid(), signal.SIGKILL)", "print('at work'); time.sleep(3)")
    running = world.send(code.replace("victim=1", "victim=0"), checkpoint_every=4, max_restarts=3).wait_for("at work")
    folder = running.outcome.folder
    batch_system.ask(*words.split(), job)
    until(lambda: not folder.read().is_active, "the run has ended", 60)
    record = folder.read()
    assert record.state == "finished", record.errors
    assert record.num_restarts == 0
    assert resumed_step(record) % 4, "the newest checkpoint was a regular one: nothing was saved at the end"
    [leader] = [agent for agent in server.agents() if agent.worlds]
    [result] = results(world.beside(AgentElsewhere(leader.address)))
    assert same(wanted, result)
    world.channel.close()
    server.do(server.pool.stop("taken"))
