"""Parts of one step and one try make a checkpoint; those of different steps make none, and are not compared."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.agent.runs.checkpoint_committer import CheckpointCommitter
from jupyter_llmcloud.agent.runs.checkpoint_parts import CheckpointParts
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart
from jupyter_llmcloud.storage.checkpoints import CheckpointFolder


class Listener:
    good_step = None

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.marks: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def mark(self, kind: str, step: int | None, text: str) -> None:
        self.marks.append(text)


def part(step: int, serial: int = 1) -> CheckpointPart:
    digests = {"weight": str(step)}
    return CheckpointPart(run_id="r", step=step, serial=serial, parameters=digests, rng=digests)


def test_a_step_that_not_every_rank_has_saved_is_left_out_and_is_no_split_and_the_next_one_is_kept(
    tmp_path: Path,
) -> None:
    listener = Listener()

    async def committed() -> list[int]:
        committer = CheckpointCommitter(tmp_path, [0, 1], 2, listener)
        for rank, step in ((0, 98), (1, 99)):
            committer.part(rank, part(step))
        lost = await committer.until_settled(98)
        (tmp_path / "checkpoints").mkdir()
        for rank in (0, 1):
            CheckpointFolder(tmp_path / "checkpoints").staging(130, 0, 1)
            committer.part(rank, part(130))
        return [lost, await committer.until_settled(130)]

    assert asyncio.run(committed()) == [-1, 130]
    assert listener.notes == [
        "the checkpoint of step 98 is left out: not every rank has saved this step. Training goes on. "
        "There is no complete one yet."
    ]
    assert listener.marks == ["checkpoint of step 130"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("the storage has no answer")])
def test_one_that_cannot_be_committed_is_said_and_the_next_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    listener = Listener()
    commit = CheckpointFolder.commit

    def refused(folder: CheckpointFolder, staging: Path, step: int, *args: Any, **about: Any) -> Any:
        if step == 4:
            raise error
        return commit(folder, staging, step, *args, **about)

    async def committed() -> list[int]:
        committer = CheckpointCommitter(tmp_path, [0], 2, listener)
        (tmp_path / "checkpoints").mkdir()
        for step in (4, 8):
            CheckpointFolder(tmp_path / "checkpoints").staging(step, 0, 1)
            committer.part(0, part(step))
        async with asyncio.timeout(10):
            return [await committer.until_settled(4), await committer.until_settled(8)]

    monkeypatch.setattr(CheckpointFolder, "commit", refused)
    assert asyncio.run(committed()) == [-1, 8]
    assert listener.notes == [
        f"the checkpoint of step 4 could not be written: {error.args[-1]}. Training goes on. There is no complete one yet."
    ]


def test_parts_are_joined_by_step_and_try_in_whatever_order_they_come() -> None:
    parts = CheckpointParts([0, 1])
    assert parts.add(0, part(4)) == (None, [])
    assert parts.add(0, part(4, 2)) == (None, [])
    whole, passed = parts.add(1, part(4))
    assert (whole, passed) == ({0: part(4), 1: part(4)}, [])
    assert parts.add(1, part(4, 2)) == ({0: part(4, 2), 1: part(4, 2)}, [])


def test_what_a_rank_has_passed_without_a_part_for_it_is_given_up_and_a_lost_rank_is_not_waited_for() -> None:
    parts = CheckpointParts([0, 1, 2])
    parts.add(0, part(4))
    parts.add(1, part(4))
    assert parts.add(2, part(6)) == (None, [{0: part(4), 1: part(4)}])
    parts.without(0)
    assert parts.add(1, part(6)) == ({1: part(6), 2: part(6)}, [])


def test_those_that_are_left_make_a_checkpoint_of_their_own_where_all_hold_the_same_step(tmp_path: Path) -> None:
    listener = Listener()

    async def newest(*parts: tuple[int, CheckpointPart]) -> int | None:
        committer = CheckpointCommitter(tmp_path, [0, 1, 2], 2, listener)
        for rank, each in parts:
            CheckpointFolder(tmp_path / "checkpoints").staging(each.step, 0, 0)
            committer.part(rank, each)
        found = await committer.newest()
        return found.step if found is not None else None

    def of_left(step: int, *left: int) -> CheckpointPart:
        return CheckpointPart(run_id="r", step=step, left=list(left))

    assert asyncio.run(newest((0, of_left(7, 0, 2)), (2, of_left(8, 0, 2)))) is None
    assert asyncio.run(newest((0, of_left(7, 0, 1, 2)), (2, of_left(7, 0, 2)))) is None, "one more was lost meanwhile"
    assert asyncio.run(newest((0, of_left(7, 0, 2)), (2, of_left(7, 0, 2)))) == 7
    assert listener.marks == ["checkpoint of step 7"]
