"""A rank that dies while nothing is executed on it: before its cell was sent, or before it is sent once more."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jupyter_llmcloud.agent.runs.supervisor import RunSupervisor
from jupyter_llmcloud.core.run.run_machine import ResumePointFound
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.rank_messages import CellEnded, Release
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

REASON = "the process was ended by SIGKILL (-9)."


class Rank:
    """Does what it is sent: a cell waits in a collective until it is released."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def drain(self) -> None:
        """It has written nothing."""

    def kill(self) -> None:
        """It is not looked at."""


class OneWorld:
    """Two ranks, which can be had again at once."""

    def __init__(self) -> None:
        self.links = {rank: Rank(rank) for rank in range(2)}
        self.dead: list[int] = []
        self.size = 2
        self.followers: list[Any] = []
        self.has_lost_members = self.was_announced = False
        self.renewed: list[bool] = []

    def needs_renewal(self, must_renew: bool) -> None:
        self.renewed.append(must_renew)

    def take_notes(self) -> list[str]:
        return []

    async def find_capacity(self, bounds: Any = None) -> list[Any]:
        return []

    async def heal(self, slots: Any = (), coming: Any = None, bounds: Any = None) -> None:
        self.dead = []


async def done() -> None:
    """Nothing to wait for."""


async def claimed() -> bool:
    return True


def lead() -> Any:
    return SimpleNamespace(
        until=None,
        is_lost=False,
        is_over=False,
        standby=lambda followers: None,
        settled=done,
        claim=claimed,
        end=lambda: None,
        forget=lambda: None,
    )


def run_of(tmp_path: Path, world: OneWorld, max_restarts: int = 1) -> RunSupervisor:
    folder = RunFolder(tmp_path / "train")
    cell = Execute(
        world_id="w",
        run_id="train",
        name="train",
        code="",
        ranks=[0, 1],
        max_restarts=max_restarts,
        folder=str(folder.path),
    )
    record = RunRecord("train", "train", ranks=[0, 1], world_size=2)
    return RunSupervisor(cell, record, folder, world, lambda _: lead())  # type: ignore[arg-type]


def dies(run: RunSupervisor, world: OneWorld, rank: int) -> None:
    world.dead.append(rank)
    run.rank_died(rank, "RankKilled", REASON)


def released(run: RunSupervisor, world: OneWorld) -> None:
    """The other rank is let out of the collective in which it would wait for the one that has gone."""
    assert any(isinstance(message, Release) for message in world.links[0].sent)
    run.on_message(0, CellEnded(run_id="train", error={"ename": "DistError", "evalue": "", "collateral": True}))


def test_a_rank_that_dies_before_its_cell_is_sent_ends_the_run(tmp_path: Path) -> None:
    async def ended() -> RunRecord:
        world = OneWorld()
        run = run_of(tmp_path, world, max_restarts=0)
        dies(run, world, 1)  # while the first term is claimed, say
        run.begin()
        released(run, world)
        await asyncio.wait_for(run.ended, 5)
        return run.record

    record = asyncio.run(ended())
    assert record.state == "failed"
    assert (record.errors[0]["rank"], record.errors[0]["evalue"]) == (1, REASON)


def test_a_rank_that_dies_while_a_checkpoint_is_verified_is_not_waited_for(tmp_path: Path) -> None:
    async def ended() -> RunRecord:
        world = OneWorld()
        run = run_of(tmp_path, world)
        run.begin()
        looking = asyncio.Event()
        go_on = asyncio.Event()

        async def find(before: int | None) -> Any:
            looking.set()
            await go_on.wait()
            return ResumePointFound(None)

        run._find_resume_point = find  # type: ignore[method-assign]
        dies(run, world, 1)
        released(run, world)
        await asyncio.wait_for(looking.wait(), 5)
        world.links[0].sent.clear()
        dies(run, world, 1)
        go_on.set()
        while not any(isinstance(message, Execute) for message in world.links[0].sent):
            await asyncio.sleep(0)
        released(run, world)
        await asyncio.wait_for(run.ended, 5)
        return run.record

    record = asyncio.run(ended())
    assert (record.state, record.num_restarts) == ("failed", 1)
    assert record.errors[0]["evalue"] == REASON
