"""Parts of one checkpoint that are of different steps make none, and are not taken for replicas that differ."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jupyter_llmcloud.agent.runs.checkpoint_committer import CheckpointCommitter
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart


class Listener:
    good_step = None

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.marks: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def mark(self, kind: str, step: int | None, text: str) -> None:
        self.marks.append(text)


def test_parts_of_different_steps_are_no_checkpoint_and_no_split(tmp_path: Path) -> None:
    listener = Listener()

    async def committed() -> int:
        committer = CheckpointCommitter(tmp_path, [0, 1], 2, listener)
        for rank, step in ((0, 98), (1, 99)):
            digests = {"weight": str(step)}
            committer.part(rank, CheckpointPart(run_id="r", step=step, serial=1, parameters=digests, rng=digests))
        return await committer.until_settled(98)

    assert asyncio.run(committed()) == -1
    assert listener.notes == [
        "the checkpoint of step 99 was not kept: ranks saved at different steps (0: 98, 1: 99). Training goes on. "
        "There is no complete one yet."
    ]
    assert not listener.marks and not list(tmp_path.rglob("*.pt"))
