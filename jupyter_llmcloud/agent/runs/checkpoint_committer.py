"""The checkpoints of a run on its leading agent: committed when every rank has written its part."""

from __future__ import annotations

import asyncio
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from jupyter_llmcloud.agent.runs.checkpoint_parts import CheckpointParts, Parts
from jupyter_llmcloud.core.run.divergence import DivergenceCheck, ReplicaDigests
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart
from jupyter_llmcloud.storage.checkpoints import Checkpoint, CheckpointFolder

FOLDER = "checkpoints"


class CommitListener(Protocol):
    """Who keeps and tells what becomes of a run."""

    def note(self, text: str) -> None:
        """A word for who follows the run, and for its record."""

    def mark(self, kind: str, step: int | None, text: str) -> None:
        """Something that charts show beside the metrics."""

    @property
    def good_step(self) -> int | None:
        """Optimizer steps after which nothing was wrong, of a run that may be rolled back to there."""


class CheckpointCommitter:
    """Commits, retains, and finds the newest that is complete.

    Args:
        path: the folder of the run.
        ranks: whose parts make a checkpoint.
        keep: how many of the last are kept.
        listener: is told what is complete, and what was lost.
    """

    def __init__(
        self,
        path: Path,
        ranks: list[int],
        keep: int,
        listener: CommitListener,
    ) -> None:
        self.attempt = 0
        self._keep = keep
        self._listener = listener
        self._path = path
        self._parts = CheckpointParts(ranks)
        self._work: asyncio.Task[None] | None = None
        self._said: set[str] = set()
        self._divergence = DivergenceCheck()
        self._sweeping: asyncio.Task[None] | None = None
        self._settled: list[tuple[int, bool, float]] = []  # steps, whether they were committed, what they have cost
        self._news = asyncio.Event()

    @cached_property
    def _folder(self) -> CheckpointFolder:
        return CheckpointFolder(self._path / FOLDER)

    def without(self, rank: int) -> None:
        """A rank is lost, and the others go on: their parts make a checkpoint."""
        self._parts.without(rank)

    def part(self, rank: int, part: CheckpointPart) -> None:
        """A rank has written its part, or could not."""
        if part.attempt != self.attempt:
            return  # of an attempt that has ended
        if part.left:
            if (left := self._parts.add_of_left(rank, part)) is not None:
                self._work = asyncio.ensure_future(self._see_to(self._work, left, True))
            return
        whole, passed = self._parts.add(rank, part)
        for parts in [*passed, *([whole] if whole is not None else [])]:
            self._work = asyncio.ensure_future(self._see_to(self._work, parts, parts is whole))

    @property
    def busy(self) -> asyncio.Task[None] | None:
        """The work that is under way, to be waited for."""
        return self._work if self._work is not None and not self._work.done() else None

    async def until_settled(self, step: int) -> int:
        """Wait for a checkpoint of this step or a later one; returns its step, -1 when it could not be kept."""
        while True:
            for settled, is_kept, _ in self._settled:
                if settled >= step:
                    return settled if is_kept else -1
            self._news.clear()
            await self._news.wait()

    async def _see_to(self, before: asyncio.Task[None] | None, parts: Parts, is_whole: bool) -> None:
        if before is not None:
            await before
        cost_s = max(part.cpu_s for part in parts.values())
        is_kept = await (self._settle(parts) if is_whole else self._drop(parts))
        self._settled = [*self._settled[-8:], (_any_of(parts).step, is_kept, cost_s)]
        self._news.set()

    @property
    def cost_s(self) -> float:
        """Processor time that the last checkpoint has cost the rank which it has cost most."""
        return self._settled[-1][2] if self._settled else 0.0

    async def _drop(self, parts: Parts) -> bool:
        """Some ranks have saved this step and others a later one: nobody could go on from it."""
        await self._remove(parts)
        await self._say_lost(_any_of(parts).step, "is left out: not every rank has saved this step")
        return False

    async def _remove(self, parts: Parts) -> None:
        await asyncio.to_thread(shutil.rmtree, self._staging(parts), True)

    def _staging(self, parts: Parts) -> Path:
        part = _any_of(parts)
        return self._folder.staging_path(part.step, part.attempt, part.serial)

    async def _settle(self, parts: Parts) -> bool:
        step, staging = _any_of(parts).step, self._staging(parts)
        held = {rank: ReplicaDigests(part.parameters, part.buffers, part.rng) for rank, part in sorted(parts.items())}
        if split := self._divergence.look(step, held):
            self._listener.note(split)
            self._listener.mark("alert", step, split)
        for rank, part in sorted(parts.items()):
            if reason := _refusal(rank, part):
                await self._remove(parts)
                await self._say_lost(step, reason)
                return False
        try:
            await asyncio.to_thread(self._commit, staging, step, parts)
        except Exception as error:  # whatever it is: the next checkpoint waits for this one
            await self._remove(parts)
            cause = error.strerror if isinstance(error, OSError) else None
            await self._say_lost(step, f"could not be written: {cause or error}")
            return False
        self._listener.mark("checkpoint", step, f"checkpoint of step {step}")
        return True

    def _commit(self, staging: Path, step: int, parts: Parts) -> None:
        files = {name: entry for part in parts.values() for name, entry in part.files.items()}
        first = _any_of(parts)
        about: dict[str, Any] = {"world_size": len(parts), "resumable": first.resumable}
        metrics = [part.metric for part in parts.values() if part.metric is not None]
        if metrics:
            about |= {"metric": sum(metrics) / len(metrics), "mode": first.mode}
        self._folder.commit(staging, step, files, **about)
        self._folder.retain(self._keep, self._listener.good_step)

    async def _say_lost(self, step: int, reason: str) -> None:
        if reason in self._said:
            return
        self._said.add(reason)
        newest, _ = await asyncio.to_thread(self._folder.newest)
        kept = f"The newest complete one is step {newest.step}." if newest else "There is no complete one yet."
        self._listener.note(f"the checkpoint of step {step} {reason}. Training goes on. {kept}")

    async def newest(self, before: int | None = None) -> Checkpoint | None:
        """The newest checkpoint from which the run can go on; those that are not complete are skipped with a word.

        With `before`, of so many steps at most: those that came later are removed.
        """
        if self.busy:
            await self.busy
        if before is not None:
            await asyncio.to_thread(self._folder.discard_after, before)
        found, skipped = await asyncio.to_thread(self._folder.newest, True)
        for reason in skipped:
            self._listener.note(f"checkpoint {reason}.")
        return found

    def new_attempt(self, number: int, ranks: list[int]) -> None:
        """The run is executed again on these ranks: whatever its last attempt still writes does not count."""
        self.attempt = number
        self._divergence = DivergenceCheck()
        self._parts = CheckpointParts(ranks)

    def end(self) -> None:
        """The run has ended: what was not committed is removed."""
        if os.path.isdir(os.path.join(self._path, FOLDER)):
            self._sweeping = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        if self.busy:
            await self.busy
        await asyncio.to_thread(self._folder.sweep)


def _any_of(parts: Parts) -> CheckpointPart:
    """They are of one step and one try."""
    return parts[min(parts)]


def _refusal(rank: int, part: CheckpointPart) -> str:
    if part.error:
        return f"could not be written by rank {rank}: {part.error}"
    if part.not_finite:
        return f"was not kept: {part.not_finite} on rank {rank}"
    return ""
