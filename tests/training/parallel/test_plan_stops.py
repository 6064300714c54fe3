"""Under every plan a Stop keeps the variables of all ranks, and the next cell works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.planned_cells import training
from tests.support.worlds import AgentProcess, Ranks

BATCH = {
    "ddp": 2,
    "fsdp": 2,
    "hsdp:2x2": 2,
    "tp:4": 8,
    "tp+fsdp": 4,
    "pipeline:4": 8,
    "local-sgd:3": 2,
    "diloco:3": 2,
    "async-ps:3": 2,
}
PRODUCTS = ("hsdp:2x2", "tp+fsdp")  # of plans that are tried by themselves
GOES_ON = 'print("at", step) if step == 3 else None; rank'


@pytest.fixture(scope="module")
def four(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 4)
    yield ranks
    ranks.end()


def cell(plan: str, after: str, epochs: int = 1) -> str:
    layers = 4 if plan.startswith("pipeline") else 2
    return training(batch=BATCH[plan], layers=layers, epochs=epochs, after=after, weights=False)


@pytest.mark.parametrize("plan", [pytest.param(plan, marks=[pytest.mark.story] * (plan in PRODUCTS)) for plan in BATCH])
def test_a_stop_keeps_the_variables_and_the_next_cell_works(four: Ranks, plan: str) -> None:
    stopped = four.send(cell(plan, GOES_ON, epochs=10_000), plan=plan).wait_for("at 3").stop().end()
    assert stopped.state == "stopped"
    four.ok(
        "at_stop, found = step, torch.ones(())\ntorch.distributed.all_reduce(found)\nalike = found.item()", plan=plan
    )
    assert [four.pull("at_stop", rank) >= 3 for rank in range(4)] == [True] * 4
    assert four.pull("alike") == 4
