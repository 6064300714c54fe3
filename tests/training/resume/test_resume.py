"""A run that loses a rank resumes from its newest complete checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from jupyter_llmcloud.storage.journal import read_all
from tests.support.resuming import CELLS, cell, dies_before, notes, results, resumed, same
from tests.support.worlds import AgentProcess, Ranks, Running, until

RESUMABLE: dict[str, Any] = {"checkpoint_every": 4, "max_restarts": 3}


@pytest.fixture(scope="module")
def undisturbed(node_agent: AgentProcess) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """The results of a cell that nothing has disturbed, which saves no checkpoints at all."""
    world = Ranks(node_agent)
    known: dict[str, list[dict[str, Any]]] = {}

    def run(name: str) -> list[dict[str, Any]]:
        if name not in known:
            world.ok(cell(name))
            known[name] = results(world)
        return known[name]

    yield run
    world.end()


# Of two cells that differ in one respect, make chaos tries the second.
VARIANTS = ("dispatched", "workers", "stream", "run.steps", "functions")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if name in VARIANTS else name for name in CELLS]
)
def test_the_final_state_is_that_of_an_undisturbed_run_to_the_last_bit(
    new_world: Callable[..., Ranks], undisturbed: Callable[[str], list[dict[str, Any]]], name: str
) -> None:
    """A rank is killed early, when there need be no checkpoint yet, and again late."""
    wanted, world = undisturbed(name), new_world()
    outcome = world.ok(dies_before(cell(name, 29), 14), **RESUMABLE)
    early, late = resumed(outcome)
    assert re.match(r"rank 1 was killed at step \d+; (resumed from step \d+|executed again).*\(restart 1 of 3\)", early)
    assert re.match(r"rank 1 was killed at step \d+; resumed from step \d+.*\(restart 2 of 3\)", late)
    for rank, result in enumerate(results(world)):
        assert same(wanted[rank], result), f"rank {rank}"


def test_checkpoints_alone_change_nothing(world: Ranks, undisturbed: Callable[[str], list[dict[str, Any]]]) -> None:
    outcome = world.ok(cell("accelerate"), **RESUMABLE)
    assert all(same(*pair) for pair in zip(undisturbed("accelerate"), results(world), strict=True))
    found, words = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert found is not None
    assert words == []
    assert found.manifest["world_size"] == 2


def test_the_journals_go_on_and_the_record_tells_of_the_restart(world: Ranks) -> None:
    outcome = world.ok(cell("accelerate", 25), **RESUMABLE)
    for rank in (0, 1):
        records = list(read_all(outcome.folder.metrics(rank)))
        assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
        last = {record["step"]: record["values"]["loss"] for record in records if "values" in record}
        assert sorted(last) == list(range(1, 37))
    why = [entry["why"] for entry in outcome.record.history if "why" in entry]
    assert any("resumed from step" in text for text in why)
    assert outcome.record.state == "finished"


def test_what_was_said_before_is_not_said_again(world: Ranks) -> None:
    outcome = world.ok(cell("accelerate", 33), **RESUMABLE)
    [step] = re.findall(r"resumed from step (\d+)", " ".join(notes(outcome)))
    epochs = [int(line.split()[1]) for line in outcome.text(0).splitlines()]
    assert sorted(set(epochs)) == [0, 1, 2]
    for epoch in range((int(step) - 1) // 6):  # had ended before the checkpoint
        assert epochs.count(epoch) == 1


def test_training_goes_on_within_seconds(world: Ranks) -> None:
    outcome = world.ok(cell("accelerate", 29), **RESUMABLE)
    steps = [record["t"] for rank, record in outcome.metrics if rank == 0]
    assert max(after - before for before, after in itertools.pairwise(steps)) < 5.0


def test_another_world_with_the_same_whole_batch_replays_and_skips_no_sample(
    world: Ranks, new_world: Callable[..., Ranks], undisturbed: Callable[[str], list[dict[str, Any]]]
) -> None:
    four = new_world(4)
    broken = world.run(cell("accelerate", 29), checkpoint_every=4)
    assert broken.state == "failed"
    newest, _ = CheckpointFolder(broken.folder.path / "checkpoints").newest()
    assert newest is not None
    outcome = four.ok(cell("accelerate", 0, batch=2), resume={"folder": str(newest.path), "step": newest.step})
    fresh = [result["samples"] for result in results(four)]
    whole = [result["samples"] for result in undisturbed("accelerate")]
    before = len([entry for entry in fresh[2] if len(entry[2]) == 4])
    assert before > 12
    assert before < 29
    for turn in range(before, 36):
        used = sorted(i for samples in fresh for i in samples[turn][2])
        assert used == sorted(i for samples in whole for i in samples[turn][2]), f"turn {turn}"
    assert outcome.state == "finished"


def test_a_whole_batch_of_another_size_is_refused_with_what_to_do(new_world: Callable[..., Ranks]) -> None:
    world = new_world(2)
    world.run(cell("accelerate"), checkpoint_every=4)
    path = _newest(world)
    outcome = world.run(cell("accelerate", 0, batch=6), resume={"folder": str(path), "step": 1})
    assert outcome.state == "failed"
    assert outcome.error["ename"] == "ResumeMissed"
    assert "batches of 8 samples" in outcome.error["evalue"]


def _newest(world: Ranks) -> Path:
    runs = sorted(Path(os.environ["LLMCLOUD_ROOT"], "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    newest, _ = CheckpointFolder(runs[-1] / "checkpoints").newest()
    assert newest is not None
    return newest.path


# --- what is not led back -------------------------------------------------------------------------------------------


def test_a_cell_that_dies_before_its_first_checkpoint_is_executed_from_its_start(world: Ranks) -> None:
    outcome = world.ok(
        """
        import os, signal, torch
        torch.manual_seed(1)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        turn = 0
        while turn < 10:
            model(torch.ones(2)).sum().backward()
            optimizer.step()
            turn += 1
            if turn == 3 and rank == 1 and not (run.folder / "died").exists():
                (run.folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        turn
        """,
        **RESUMABLE,
    )
    assert "executed again from its start" in resumed(outcome)[0]
    assert outcome.results() == ["10", "10"]


def test_a_cell_that_fails_on_the_way_back_is_executed_from_its_start(world: Ranks) -> None:
    code = cell("accelerate", 25).replace("model = net()", "model = net() if not run_again() else nn.Linear(8, 1)")
    code = code.replace("accelerator = Acc", "def run_again():\n    return _again()\naccelerator = Acc", 1)
    code = (
        """
def _again():
    # another model than before, but only the first time that the cell is executed again
    died, tried = run.folder / "died", run.folder / f"tried-{rank}"
    if died.exists() and not tried.exists():
        tried.touch()
        return True
    return False
"""
        + code
    )
    outcome = world.ok(code, **RESUMABLE)
    first, second = resumed(outcome)
    assert "resumed from step" in first
    assert "executed again from its start (restart 2 of 3)" in second
    assert results(world)[0]["more"][0] == 36


def test_an_error_of_the_script_uses_up_no_restart(world: Ranks) -> None:
    code = cell("run.steps").replace("perhaps_die(step + 1)", "assert step < 21, 'bad sample'")
    outcome = world.run(code, **RESUMABLE)
    assert outcome.state == "failed"
    assert outcome.error["ename"] == "AssertionError"
    assert (len(resumed(outcome)), outcome.record.num_restarts) == (0, 0)
    assert any("not executed again: AssertionError is an error of the script" in note for note in notes(outcome))


@pytest.mark.story
def test_a_loaders_worker_that_is_killed_is_a_loss_like_that_of_a_rank(world: Ranks) -> None:
    undisturbed = cell("accelerate").replace("shuffle=True)", "shuffle=True, num_workers=1)")
    world.ok(undisturbed)
    wanted = results(world)
    killed = cell("accelerate", 25).replace("shuffle=True)", "shuffle=True, num_workers=1)")
    killed = killed.replace("os.kill(os.getpid(), signal.SIGKILL)", "kill_worker()").replace(
        "def perhaps_die",
        """def kill_worker():
    import multiprocessing
    for child in multiprocessing.active_children():
        child.kill()
        child.join()

def perhaps_die""",
    )
    outcome = world.ok(killed, **RESUMABLE)
    assert len(resumed(outcome)) == 1
    assert all(same(*pair) for pair in zip(wanted, results(world), strict=True))


def test_a_stop_between_two_attempts_ends_the_run_and_the_next_cell_works(world: Ranks) -> None:
    running = world.send(
        """
        import os, signal, torch
        optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
        optimizer.step()
        run.log(loss=1.0)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()
        """,
        max_restarts=9,
    )
    until_restarts(running, 3)  # it makes no progress, so it waits longer and longer
    outcome = running.stop().end()
    assert outcome.state == "stopped"
    assert outcome.seconds < 8.0
    assert world.ok("rank").results() == ["0", "1"]


def until_restarts(running: Running, number: int) -> None:
    """Until a run was executed again so often."""
    deadline = time.monotonic() + 60
    while len(resumed(running.outcome)) < number:
        running._take(deadline, f"restart {number}")


def test_batches_that_are_kept_and_repeated_are_not_resumed_wrongly(world: Ranks) -> None:
    code = cell("plain torch", 19).replace("batches, samples, drawn = forever()", "batches, samples, drawn = endless()")
    code = code.replace("def forever", "import itertools\ndef endless(): return itertools.cycle(loader)\ndef forever")
    outcome = world.ok(code, **RESUMABLE)
    assert any("itertools.cycle" in note for note in notes(outcome))
    assert "executed again from its start" in resumed(outcome)[0]


# --- run.checkpoint -------------------------------------------------------------------------------------------------


def test_a_cell_may_ask_for_checkpoints_and_hand_over_what_belongs_to_them(world: Ranks) -> None:
    outcome = world.ok(
        """
        import os, signal, time, torch
        from torch.optim.swa_utils import AveragedModel
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
        ema = AveragedModel(model.module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(20):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            ema.update_parameters(model.module)
            if step in (5, 9):
                run.checkpoint(ema=ema, metric=-step, mode="min")
            if step == 15 and rank == 1 and not run.resumed_step:
                while not (run.folder / "checkpoints" / "step-10").exists():
                    time.sleep(0.01)  # it is written beside the training
                os.kill(os.getpid(), signal.SIGKILL)
        int(ema.n_averaged), run.resumed_step
        """,
        max_restarts=1,
    )
    assert outcome.results() == ["(20, 10)", "(20, 10)"]
    manifest = CheckpointFolder(outcome.folder.path / "checkpoints").newest()[0]
    assert manifest is not None
    assert manifest.manifest["metric"] == -9


def test_what_has_no_state_is_refused_where_it_is_handed_over(world: Ranks) -> None:
    outcome = world.run("run.checkpoint(model=3)")
    assert "model=int: it has no state_dict()" in outcome.error["evalue"]


def test_models_that_differ_between_ranks_are_saved_by_each(world: Ranks) -> None:
    outcome = world.ok(
        """
        import os, signal, torch
        torch.manual_seed(rank)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in run.steps(20):
            optimizer.zero_grad()
            model(torch.ones(4)).square().mean().backward()
            optimizer.step()
            if step == 14 and rank == 1 and not run.resumed_step:
                os.kill(os.getpid(), signal.SIGKILL)
            torch.distributed.barrier()
        start = model.weight[0, 0].item()
        torch.manual_seed(rank)
        expected = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
        for step in range(20):
            optimizer.zero_grad()
            expected(torch.ones(4)).square().mean().backward()
            optimizer.step()
        torch.equal(expected.weight, model.weight)
        """,
        **RESUMABLE,
    )
    assert "resumed from step" in resumed(outcome)[0]
    assert outcome.results() == ["True", "True"]


# --- what is never kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["model.module[0].weight.data[0, 0] = float('nan')", "run.log(loss=float('inf'))"])
def test_a_state_that_is_not_finite_is_never_kept(world: Ranks, harm: str) -> None:
    code = cell("run.steps").replace("perhaps_die(step + 1)", f"if step == 10: {harm}")
    if "log" in harm:
        code = code.replace("run.log(loss=loss, step=step)", "")
    outcome = world.ok(code, checkpoint_every=4)
    found, _ = CheckpointFolder(outcome.folder.path / "checkpoints").newest()
    assert found is not None
    assert found.step <= 8
    assert any(re.search(r"step \d+ was not kept: .*not finite", note) for note in notes(outcome))


def test_a_full_disk_is_said_and_training_goes_on(new_world: Callable[..., Ranks], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        world = new_world()
        code = cell("run.steps").replace("optimizer.step()", "optimizer.step()\n    if step == 12: fill()")
        code = (
            "def fill():\n"
            "    if rank == 0:\n"
            "        for _ in range(2000):\n"
            "            try:\n"
            "                with open(run.folder / 'filler', 'ab', buffering=0) as file: file.write(bytes(4096))\n"
            "            except OSError: break\n" + code
        )
        outcome = world.run(code, checkpoint_every=4, folder=str(disk / "runs" / "full"))
        assert any("No space left on device" in note for note in notes(outcome)), notes(outcome)
        found, _ = CheckpointFolder(disk / "runs" / "full" / "checkpoints").newest()
        assert found is not None
        assert found.step in (4, 8, 12)  # one that comes due while another is written is left out
        assert results(world)[0]["more"][0] == 39


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own; where that is not allowed the test is skipped."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "llmcloud-test", str(path)], check=False)
    if made.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_corrupt_checkpoint_is_skipped_with_a_word_when_the_run_goes_on(world: Ranks) -> None:
    harm = """
    if step == 25 and rank == 0 and not (run.folder / "harmed").exists():
        (run.folder / "harmed").touch()
        newest = max((run.folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
        (newest / "shared.pt").write_bytes(b"nonsense")
        print("harmed", newest.name)
    """
    code = cell("run.steps", 27).replace("    perhaps_die(step + 1)", harm + "\n    perhaps_die(step + 1)")
    outcome = world.ok(code, **RESUMABLE)
    [harmed] = re.findall(r"harmed (step-\d+)", outcome.text(0))
    if any(f"{harmed} was skipped" in note for note in notes(outcome)):
        assert "shared.pt has 8 bytes" in " ".join(notes(outcome))
    assert results(world)[0]["more"][0] == 39


def test_a_checkpoint_runs_no_code_when_it_is_read(world: Ranks, tmp_path: Path) -> None:
    import pickle

    world.ok(cell("run.steps"), checkpoint_every=4)
    path = tmp_path / "step-8"
    shutil.copytree(_newest(world), path)
    canary = tmp_path / "canary"

    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    (path / "shared.pt").write_bytes(pickle.dumps(Harm()))
    outcome = world.run(cell("run.steps"), resume={"folder": str(path), "step": 8})
    assert outcome.state == "failed"
    assert not canary.exists()


def test_no_writer_is_left_when_a_run_is_stopped(world: Ranks) -> None:
    code = cell("run.steps").replace("run.steps(40)", "run.steps(100000)")
    code = code.replace("perhaps_die(step + 1)", "print('turn')")
    running = world.send(code, checkpoint_every=1).wait_for("turn", 60)
    outcome = running.stop().end()
    assert outcome.state == "stopped"
    folder = outcome.folder.path / "checkpoints"
    until(lambda: not [name for name in os.listdir(folder) if name.startswith(".")], "nothing half-written is left")
    assert CheckpointFolder(folder).newest()[0] is not None
    assert world.ok("rank").results() == ["0", "1"]
