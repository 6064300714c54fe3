"""Kind slurm against a real slurmctld and slurmd: worlds on its jobs, and the end of their walltime."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
        yield running


def test_a_run_saves_at_the_end_of_its_walltime_and_goes_on_in_the_next_job_to_the_same_weights(
    batch_system: Slurm, server: Server, tmp_path: Path
) -> None:
    options = {**OPTIONS, "log_directory": str(tmp_path), "local_directory": str(tmp_path)}
    server.do(server.pool.start("slurm", "batch", 1, options))
    until(lambda: len(server.agents()) == 1, "the first job runs", 60)
    world = server.world(1, link_lease_s=10.0)
    assert world.ok(SUM).results() == ["1"]
    world.ok(cell("accelerate"))
    [wanted] = results(world)

    server.do(server.pool.scale("batch", 2))
    until(lambda: len(server.agents()) == 2, "the second job runs", 60)
    first = next(agent for agent in server.agents() if not agent.free_slots)
    waits = "print('at work', flush=True); signal.pause()"
    code = cell("accelerate", 25).replace("os.kill(os.getpid(), signal.SIGKILL)", waits).replace("victim=1", "victim=0")
    running = world.send(code, checkpoint_every=4, max_restarts=3).wait_for("at work")
    began, folder = time.monotonic(), running.outcome.folder
    until(lambda: "TIMEOUT" in batch_system.states().values(), "the walltime of the first job ends", 150)
    until(lambda: not folder.read().is_active, "the run has ended", 120)
    record = folder.read()
    assert record.state == "finished", record.errors
    print(f"finished {time.monotonic() - began:.0f} s after it came to wait; {record.history}")
    [why] = [entry["why"] for entry in record.history if "resumed from step" in entry.get("why", "")]
    step = int(re.search(r"resumed from step (\d+)", why)[1])  # type: ignore[index]
    assert step % 4, "the newest checkpoint was one of the regular ones: nothing was saved at the end of the walltime"
    [leader] = [agent for agent in server.agents() if agent.worlds]
    assert leader.name != first.name
    [result] = results(world.beside(AgentElsewhere(leader.address)))
    assert same(wanted, result)
    world.channel.close()
