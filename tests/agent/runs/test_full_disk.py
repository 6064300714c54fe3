"""A disk that fills up under a run: training goes on, it is said, and the end of the run is told all the same."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from jupyter_llmcloud.errors import LLMCloudError, WorldError
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.client import AgentChannel
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.storage.runs import RunFolder
from tests.support.worlds import AgentProcess, Outcome, Ranks, family, until

SIZE = 4 << 20
MOUNT = f'mount -t tmpfs -o size={SIZE} llmcloud-test "$0" && exec "$@"'
TRAIN = """
import os, time, torch
torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
for step in run.steps(10_000):
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    run.log(loss=1.0)
    print("step", step)
    if os.path.exists(DONE): break
    time.sleep(0.02)
steps_taken = step
"""


@dataclass
class SmallDisk:
    """A folder with little room, for an agent and what it starts.

    Attributes:
        path: as they see it; seen: as the test sees it.
        agent: the agent on it.
    """

    path: Path
    seen: Path
    agent: AgentProcess

    def fill(self) -> None:
        """Leave no byte."""
        with (self.seen / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Give the room back."""
        (self.seen / "filler").unlink()


class SmallFiles(SmallDisk):
    """Where no file system can be made: whatever its processes write is refused, by a limit of the kernel's."""

    def fill(self) -> None:
        self._limit(0)

    def free(self) -> None:
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        for pid in family(self.agent.process.pid):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


@contextlib.contextmanager
def mounted_disk(folder: Path) -> Iterator[SmallDisk]:
    """A tmpfs in a mount namespace of the agent's own, which needs no rights where users may make namespaces."""
    start = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    agent = AgentProcess(prefix=[*start, "sh", "-c", MOUNT, str(folder)])
    try:
        yield SmallDisk(folder, Path(f"/proc/{agent.process.pid}/root{folder}"), agent)
    finally:
        agent.end()


@contextlib.contextmanager
def limited_disk(folder: Path) -> Iterator[SmallDisk]:
    agent = AgentProcess()
    try:
        yield SmallFiles(folder, folder, agent)
    finally:
        agent.end()


def can_mount(folder: Path) -> bool:
    start = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    try:
        done = subprocess.run([*start, "sh", "-c", MOUNT, str(folder), "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """A full file system where one can be made, else a limit that refuses every write."""
    folder = tmp_path_factory.mktemp("small")
    with (mounted_disk if can_mount(folder) else limited_disk)(folder) as disk:
        yield disk


@pytest.fixture
def world(disk: SmallDisk) -> Iterator[Ranks]:
    ranks = Ranks(disk.agent)
    yield ranks
    ranks.end()


def at(disk: SmallDisk, outcome: Outcome) -> RunFolder:
    """The folder of a run as the test sees it."""
    return RunFolder(disk.seen / Path(outcome.folder.path).relative_to(disk.path))


def notes(outcome: Outcome) -> list[str]:
    return [state.detail for state in outcome.states if state.state == "note"]


def test_a_run_whose_disk_fills_up_trains_on_says_so_and_its_end_is_on_disk(
    disk: SmallDisk, world: Ranks, tmp_path: Path
) -> None:
    done, folder = tmp_path / "done", disk.path / "runs" / "fills"
    running = world.send(TRAIN.replace("DONE", repr(str(done))), checkpoint_every=5, folder=str(folder))
    seen = RunFolder(disk.seen / "runs" / "fills")
    checkpoints = CheckpointFolder(seen.path / "checkpoints")
    until(lambda: checkpoints.newest()[0], "a checkpoint is complete")
    running.wait_for("step", 40)
    disk.fill()
    try:
        running.wait_for_state("note")
        said = running.outcome.text()
        running.wait_for("step", said.count("step") + 200)  # it trains on
        running.stop()
        outcome = running.end()
        assert outcome.state == "stopped"
        assert any("not complete" in note or "could not be written" in note for note in notes(outcome)), notes(outcome)
        assert any("No space left" in note or "too large" in note for note in notes(outcome)), notes(outcome)
        if not isinstance(disk, SmallFiles):  # which refuses what fits as well
            assert seen.read().state == "stopped"
        newest, _ = checkpoints.newest()
        assert newest is not None
    finally:
        disk.free()
    until(lambda: seen.read().state == "stopped", "the end of the run is told", 5)
    told = outcome.text().count("step") // 2 - 1  # on each rank, when it was stopped
    until(lambda: sum(rank == 0 for rank, _ in seen.records("metrics")) >= told, "metrics that waited for room", 10)
    until(lambda: len(lines_of(seen)) >= told, "lines that waited for room", 10)
    assert lines_of(seen) == [f"step {step}" for step in range(len(lines_of(seen)))]
    assert world.ok("steps_taken if 'steps_taken' in globals() else 'kept'").results() == ["'kept'"] * 2


def lines_of(folder: RunFolder) -> list[str]:
    """What rank 0 has printed, as its log keeps it."""
    return "".join(record["text"] for rank, record in folder.records("logs") if rank == 0).splitlines()


def test_a_disk_that_is_full_when_a_cell_was_sent_does_not_keep_it_from_running(disk: SmallDisk, world: Ranks) -> None:
    disk.fill()
    try:
        outcome = world.run("kept = rank\nprint('ran')", folder=str(disk.path / "runs" / "unlucky"))
        assert outcome.state == "finished"
        assert outcome.text() == "ran\nran\n"
        assert any("not complete" in note for note in notes(outcome))
        with pytest.raises(WorldError, match=r"no room for a run.*(No space left|too large).*Nothing was run"):
            submit(world, disk, "behind")
    finally:
        disk.free()
    assert world.ok("kept", folder=str(disk.path / "runs" / "lucky")).results() == ["0", "1"]
    seen = RunFolder(disk.seen / "runs" / "unlucky")
    until((seen.path / "run.json").exists, "its end is told when there is room again", 5)
    assert (seen.read().state, seen.source()) == ("finished", "%%distribute\nkept = rank\nprint('ran')")
    assert sorted(record["text"] for _, record in seen.records("logs")) == ["ran\n", "ran\n"]


def submit(world: Ranks, disk: SmallDisk, name: str) -> None:
    """A background cell; raises what it is refused with."""
    channel = AgentChannel(world.agent.address)
    try:
        folder = str(disk.path / "runs" / name)
        cell = Execute(world_id=world.world_id, run_id=name, name=name, code="1", folder=folder, background=True)
        channel.request(cell)
    finally:
        channel.close()


def test_a_place_where_no_folder_can_be_made_refuses_the_cell_and_nothing_runs(world: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LLMCloudError, match="folder cannot be made: Not a directory"):
        world.run("never = 1", folder=str(tmp_path / "file" / "run"))
    assert world.ok("'never' in globals()").results() == ["False", "False"]
    assert all(psutil.pid_exists(pid) for pid in world.pids())
