"""Under every plan a run goes on from its checkpoint when a rank is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.planned_cells import training
from tests.support.worlds import AgentProcess, Ranks

BATCH = {"ddp": 2, "fsdp": 2, "hsdp:2x2": 2, "tp:4": 8, "tp+fsdp": 4, "pipeline:4": 8, "local-sgd:3": 2, "diloco:3": 2}
DIES = """import os, pathlib, time
        if step == 4: run.checkpoint()
        mark, deadline = pathlib.Path(r"{mark}"), time.monotonic() + 60
        if step == 6 and rank == 2 and not mark.exists():
            while not (run.folder / "checkpoints/step-4/manifest.json").exists():
                assert time.monotonic() < deadline, "no checkpoint is committed"
                time.sleep(0.01)
            mark.touch(); os.kill(os.getpid(), 9)"""


@pytest.fixture(scope="module")
def four(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 4)
    yield ranks
    ranks.end()


def cell(plan: str, after: str, epochs: int = 1) -> str:
    layers = 4 if plan.startswith("pipeline") else 2
    return training(batch=BATCH[plan], layers=layers, epochs=epochs, after=after, weights=False)


@pytest.mark.parametrize("plan", BATCH)
def test_a_run_whose_rank_is_killed_ends_with_the_losses_of_an_undisturbed_one(
    four: Ranks, plan: str, tmp_path: Path
) -> None:
    mark = tmp_path / "died"
    mark.touch()
    four.ok(cell(plan, DIES.format(mark=mark)), plan=plan, max_restarts=1)
    undisturbed = four.pull("losses")
    mark.unlink()
    outcome = four.ok(cell(plan, DIES.format(mark=mark)), plan=plan, max_restarts=1)
    assert mark.exists() and outcome.record.num_restarts == 1
    assert any("resumed from step 4" in change.get("why", "") for change in outcome.record.history)
    assert len(undisturbed) == 8
    assert four.pull("losses") == pytest.approx(undisturbed, abs=1e-6)
