"""Every plan trains what one process trains, is what it says, and goes on under another plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.planned_cells import training
from tests.support.worlds import AgentProcess, Ranks


# By plan, the batch of each rank: the global batch is that of the process alone.
SGD = "SGD(model.parameters(), lr=0.5)"
CLIP, NO_CLIP = 1.0, 1e9
APART = ("local-sgd:1", "diloco:1,outer-lr=1,momentum=0")
EXACT = {"ddp": 2, "fsdp": 2, "hsdp:2x2": 2, **dict.fromkeys(APART, 2), "tp:4": 8, "tp+fsdp": 4}


@pytest.fixture(scope="module")
def four(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 4)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def alone(node_agent: AgentProcess) -> dict[float, Any]:
    """What one process gets of the same global batches."""
    ranks = Ranks(node_agent, 1)
    found = {}
    for clip in (CLIP, NO_CLIP):
        ranks.ok(training(batch=8, clip=clip, optimizer=SGD))
        found[clip] = {"losses": ranks.pull("losses"), "state": ranks.pull("state")}
    ranks.end()
    return found


def close(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(state[name], value, atol=atol), (name, (state[name] - value).abs().max())


@pytest.mark.parametrize("plan", EXACT)
def test_a_plan_trains_what_one_process_trains(four: Ranks, alone: dict[float, Any], plan: str) -> None:
    # Ranks that train apart clip their own gradients.
    wanted = alone[clip := NO_CLIP if plan in APART else CLIP]
    cell = training(batch=EXACT[plan], clip=clip, seed="rank" if plan != "ddp" else "0", optimizer=SGD)
    four.ok(cell, plan=plan)
    assert four.pull("losses") == pytest.approx(wanted["losses"], abs=1e-5)
    for rank in range(4):
        close(four.pull("state", rank), wanted["state"])


# --- checkpoints -----------------------------------------------------------------------------------------------------

ADAM = "AdamW(model.parameters(), lr=1e-2)"
CHECKPOINT_AND_FAIL = "run.checkpoint() if step % 4 == 0 else None; assert step != fails_at"


def resumed(world: Ranks, legs: dict[str, int], cell: Any) -> list[float]:
    """Train under one plan until a step, then go on from the newest checkpoint under the next one, and so on."""
    resume: dict[str, Any] = {}
    for plan, fails_at in legs.items():
        world.push(fails_at=fails_at)
        outcome = world.run(cell(plan), plan=plan.rstrip(), resume=resume)
        if fails_at:
            assert outcome.error["ename"] == "AssertionError", "\n".join(outcome.error["traceback"])
            newest = max(int(path.name.split("-")[1]) for path in (outcome.folder.path / "checkpoints").glob("step-*"))
            resume = {"folder": str(outcome.folder.path / f"checkpoints/step-{newest}"), "step": newest}
        else:
            assert outcome.state == "finished", "\n".join(outcome.error["traceback"])
    losses: list[float] = world.pull("losses")
    return losses


def test_a_run_goes_on_under_other_plans_as_if_nothing_had_been(four: Ranks) -> None:
    def cell(plan: str) -> str:
        return training(batch=EXACT[plan.rstrip()], epochs=3, optimizer=ADAM, after=CHECKPOINT_AND_FAIL, tied=True)

    undisturbed = resumed(four, {"ddp": 0}, cell)
    state = four.pull("state")
    legs = {"ddp": 5, "fsdp": 9, "tp+fsdp": 13, "hsdp:2x2": 17, "tp:4": 21, "ddp ": 0}
    losses = resumed(four, legs, cell)
    assert losses == pytest.approx(undisturbed, abs=1e-4)
    close(four.pull("state"), state, 1e-3)
