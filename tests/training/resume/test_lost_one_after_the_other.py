"""Ranks that are lost one after the other: what the first attempt made in a surviving process is saved by the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jupyter_llmcloud.storage.checkpoints import CheckpointFolder
from tests.support.object_graphs import put, saved_by
from tests.support.resuming import notes, resumed
from tests.support.worlds import Ranks

# What is made in one step and not touched again is found unchanged by an attempt whose process has it already.
CELL = """
import os, signal, torch
torch.manual_seed(0)
model = torch.nn.Linear(200, 200)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
{before}
for step in run.steps({steps}):
    loss = model(torch.randn(4, 200)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 3:
        best = {{name: value.clone() for name, value in model.state_dict().items()}}
        history = list(range(5000))
        cache.update((n, n + rank) for n in range(5000))
        note = f"made at 3 by {{rank}}"
    for turn, victim in {kills}:
        once = run.folder / f"died-{{turn}}"
        if step == turn and rank == victim and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
result = best["weight"].sum().item(), sum(history), sum(cache.values()), note, loss.item()
"""


def cell(kills: list[tuple[int, int]], before: str = "cache = {}", steps: int = 40) -> str:
    return CELL.format(kills=kills, before=before, steps=steps)


def results(world: Ranks) -> list[Any]:
    return [world.pull("result", rank) for rank in range(world.size)]


@pytest.mark.parametrize("before", ["cache = {}", ""], ids=["of the cell", "of another cell"])
def test_each_rank_has_what_it_made_before_the_first_was_lost(new_world: Callable[..., Ranks], before: str) -> None:
    fresh = new_world()
    fresh.ok(cell([]))
    wanted = results(fresh)
    world = new_world()
    world.ok("cache = {}")
    outcome = world.ok(cell([(14, 1), (26, 0)], before), checkpoint_every=4, max_restarts=3)
    assert len(resumed(outcome)) == 2, notes(outcome)
    assert results(world) == wanted


def test_a_later_cell_that_resumes_a_run_which_was_restarted_has_all_of_it(new_world: Callable[..., Ranks]) -> None:
    """From its last step: nothing of the loop is executed again."""
    world = new_world()
    ended = world.ok(cell([(14, 1)], steps=20), checkpoint_every=4, max_restarts=3)
    assert len(resumed(ended)) == 1
    wanted = results(world)
    newest, _ = CheckpointFolder(ended.folder.path / "checkpoints").newest(resumable=True)
    assert newest is not None and newest.step == 20
    other = new_world()
    other.ok(cell([], steps=20), resume={"folder": str(newest.path), "step": 20})
    assert results(other) == wanted


def test_what_was_restored_is_in_the_next_checkpoint_whole() -> None:
    """By values: an attempt that finds `kept` as its checkpoint has it, and does nothing to it."""

    def make() -> dict[str, Any]:
        return {"kept": {}}

    def fill(names: dict[str, Any]) -> None:
        names["kept"].update((n, n) for n in range(5000))

    def filled() -> dict[str, Any]:
        names = make()
        fill(names)
        return names

    saved, _ = saved_by(make, fill)
    again, _ = saved_by(filled, lambda names: None, saved)
    assert len(put(again, make())["kept"]) == 5000
