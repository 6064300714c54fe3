"""Whose turn it is on the ranks of a world, by values."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.agent.world import run_queue
from jupyter_llmcloud.agent.world.run_queue import RunQueue
from jupyter_llmcloud.protocol.agent_messages import Execute


@pytest.fixture
def make_queue(monkeypatch: pytest.MonkeyPatch) -> type[RunQueue]:
    monkeypatch.setattr(run_queue, "library_versions", dict)
    return RunQueue


@pytest.mark.parametrize("turns", range(4))
def test_a_stop_counts_in_whatever_moment_the_turn_comes(
    make_queue: type[RunQueue], tmp_path: Path, turns: int
) -> None:
    """The run before it has just ended: so many turns of the loop ago."""

    async def stopped() -> tuple[bool, bool]:
        world: Any = SimpleNamespace(size=1, world_id="w", cwd=str(tmp_path), num_threads={}, ranks_of_hosts=[1])
        world.is_reshaped, world.take_phases = False, list
        node: Any = SimpleNamespace(address="a.sock", has_gpus=False)
        queue = make_queue(node, world, lambda: None)
        await queue.lock.acquire()
        cell = Execute(world_id="w", run_id="r", name="r", code="", ranks=[0], folder=str(tmp_path / "r"))
        waiting = asyncio.ensure_future(queue._wait_for_ranks(cell, None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        queue.lock.release()
        for _ in range(turns):
            await asyncio.sleep(0)
        was_waiting = "r" in queue
        if was_waiting:
            queue.stop("r")
        goes = await asyncio.wait_for(waiting, 5)
        return was_waiting and goes, queue.lock.locked() == goes

    began_though_stopped, lock_is_as_it_should_be = asyncio.run(stopped())
    assert not began_though_stopped
    assert lock_is_as_it_should_be
