"""`--plan async-ps`: workers exchange with a parameter server when each is ready, and do without those that are lost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.planned_cells import training
from tests.support.worlds import AgentProcess, Ranks

SGD = "SGD(model.parameters(), lr=0.5)"
ADAM = "AdamW(model.parameters(), lr=1e-2)"
IN_STEP = "async-ps:1,staleness=0,outer-lr=1,momentum=0,servers=2"  # every round all workers, each with one step


@pytest.fixture(scope="module")
def three(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 3)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def alone(node_agent: AgentProcess) -> dict[str, Any]:
    """What one process gets of the same global batches."""
    ranks = Ranks(node_agent, 1)
    found = {}
    for name, cell in (("sgd", in_step(6)), ("adam", training(batch=6, clip=1e9, optimizer=ADAM, epochs=6))):
        ranks.ok(cell)
        found[name] = {"losses": ranks.pull("losses"), "state": ranks.pull("state")}
    ranks.end()
    return found


def in_step(batch: int) -> str:
    """A training whose batches are whole on three ranks, too."""
    text = training(batch=batch, clip=1e9, optimizer=SGD, epochs=2)
    return text.replace("(64, 8), generator", "(60, 8), generator")


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def of_epoch(losses: list[float], epoch: int, epochs: int = 6) -> float:
    size = len(losses) // epochs
    return mean(losses[epoch * size :][:size])


HELD = "held = {name: value.clone() for name, value in model.state_dict().items()}"


def hold_the_same(world: Ranks, ranks: list[int]) -> None:
    world.ok(HELD)
    first, *others = [world.pull("held", rank) for rank in ranks]
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


SLOW_TO_ASK = """
import time
from jupyter_llmcloud.training.parallel.asynchronous.client import ParameterClient
asks = ParameterClient.pull
def late(*args):
    time.sleep(0.2)
    return asks(*args)
if rank == 1:
    ParameterClient.pull = late
"""


def test_workers_in_step_train_what_one_process_trains(three: Ranks, alone: dict[str, Any]) -> None:
    # Each step the body gathers the losses, so that nobody sends before all have what was sent before.
    three.ok(SLOW_TO_ASK)
    try:
        three.ok(in_step(2), plan=IN_STEP)
    finally:
        three.ok("ParameterClient.pull = asks")
    assert three.pull("losses") == pytest.approx(alone["sgd"]["losses"], abs=1e-4)
    for rank in range(3):
        state = three.pull("state", rank)
        assert all(torch.allclose(state[name], value, atol=1e-4) for name, value in alone["sgd"]["state"].items())
    hold_the_same(three, [0, 1, 2])


def test_workers_on_their_own_come_to_the_loss_of_one_process(three: Ranks, alone: dict[str, Any]) -> None:
    outcome = three.ok(training(batch=2, clip=1e9, optimizer=ADAM, epochs=6), plan="async-ps:4")
    assert of_epoch(three.pull("losses"), 5) == pytest.approx(of_epoch(alone["adam"]["losses"], 5), rel=0.15)
    assert "rounds of ranks 0 to 2: " in outcome.text(0, "stderr")
    hold_the_same(three, [0, 1, 2])


SLOW = "time.sleep(0.1) if rank == 2 else None; of_rounds.append(ACTIVE.strategy.replicas[-1].round_steps)"


def test_a_slower_worker_makes_fewer_steps_a_round(three: Ranks) -> None:
    cell = training(batch=2, epochs=2, after=SLOW, weights=False).replace(
        'accelerator.reduce(loss.detach(), "mean").item()', "loss.item()"
    )
    begin = "import time\nfrom jupyter_llmcloud.training.parallel.strategies.active import ACTIVE\nof_rounds = []\n"
    three.ok(begin + cell, plan="async-ps:4,staleness=1")
    assert max(three.pull("of_rounds", 0)) == 4
    assert min(three.pull("of_rounds", 2)) <= 2


CHECKPOINT_AND_FAIL = "run.checkpoint() if step % 4 == 0 else None; assert step != fails_at"


def resumed(world: Ranks, legs: dict[str, int]) -> list[float]:
    """Train under one plan until a step, then go on from the newest checkpoint under the next one."""
    resume: dict[str, Any] = {}
    for plan, fails_at in legs.items():
        world.push(fails_at=fails_at)
        cell = training(batch=2, epochs=2, optimizer=ADAM, after=CHECKPOINT_AND_FAIL)
        outcome = world.run(cell, plan=plan, resume=resume)
        if fails_at:
            assert outcome.error["ename"] == "AssertionError", "\n".join(outcome.error["traceback"])
            newest = max(int(path.name.split("-")[1]) for path in (outcome.folder.path / "checkpoints").glob("step-*"))
            assert newest == fails_at // 4 * 4
            resume = {"folder": str(outcome.folder.path / f"checkpoints/step-{newest}"), "step": newest}
        else:
            assert outcome.state == "finished", "\n".join(outcome.error["traceback"])
    losses: list[float] = world.pull("losses")
    return losses


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param({"async-ps:2": 10, "async-ps:2,staleness=1": 0}, marks=pytest.mark.soak),
        pytest.param({"async-ps:2,servers=2": 6, "ddp": 14, "async-ps:4": 0}, marks=pytest.mark.story),
    ],
)
def test_a_run_goes_on_from_its_checkpoint_also_under_another_plan(three: Ranks, legs: dict[str, int]) -> None:
    undisturbed, losses = resumed(three, {"async-ps:2": 0}), resumed(three, legs)
    assert len(losses) == len(undisturbed) == 22
    assert losses[:4] == pytest.approx(undisturbed[:4], abs=0.1)
    assert mean(losses[-11:]) == pytest.approx(mean(undisturbed[-11:]), rel=0.05)
    hold_the_same(three, [0, 1, 2])


# --- workers that are lost ------------------------------------------------------------------------------------------

STEPS = """
import os
losses = []
step = 0
while True:
    loss = model(input_ids=rows[:6], labels=rows[:6]).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    step += 1
    if rank == loser and step == 10:
        os.kill(os.getpid(), 9)
    if step == 40:
        break
names = list(accelerator.get_state_dict(model))
alone_at_last = accelerator.gather(torch.tensor([float(rank)])).tolist()
"""


def test_a_worker_that_is_killed_costs_its_last_steps_only(new_world: Any) -> None:
    world = new_world(3)
    world.push(loser=1)
    text = training(batch=2, weights=False, optimizer=ADAM)
    outcome = world.ok(text[: text.index("losses, step = ")] + STEPS, plan="async-ps:4", save=["model"])
    assert outcome.record.world_size == 3
    notes = " ".join(row.detail for row in outcome.states if row.state == "note")
    assert "rank 1 is lost" in notes and "The others go on without it" in notes
    assert re.search(r"\b[1-9]\d* \(lost\)", outcome.text(0, "stderr"))  # the rounds that it had handed in count
    losses = world.pull("losses")
    assert len(losses) == 40 and mean(losses[-5:]) < losses[0] - 1
    assert world.pull("alone_at_last") == [0.0, 2.0]
    assert load_file(outcome.folder.path / "model/model.safetensors").keys() == set(world.pull("names"))
    # The next cell has all ranks again.
    world.ok("import torch\nfound = torch.ones(())\ntorch.distributed.all_reduce(found)\nassert found == 3")


LEDGER = """
import os
from collections import Counter
import jupyter_llmcloud as lc
data = torch.utils.data.TensorDataset(torch.arange(64), rows)
loaders = {"prepared": accelerator.prepare(DataLoader(data, batch_size=2, shuffle=True, num_workers=num_workers)),
           "loaded": lc.data.load(data, batch_size=2, shuffle=True, collate_fn=torch.utils.data.default_collate)}
seen, sizes, steps = [], [], 0
for epoch in range(3):
    seen.append([])
    for number, batch in loaders[kind]:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        seen[-1] += number.tolist()
        sizes += [len(accelerator.gather(number))]
        steps += 1
        if rank == 1 and epoch == 0:
            told = open(place + "/rows", "a")
            told.write(" ".join(map(str, number.tolist())) + "\\n")
            told.close()
        if rank == 1 and steps == 6:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("kind", "num_workers"), [("prepared", 0), ("prepared", 2), ("loaded", 0)])
def test_the_others_train_on_the_rows_of_a_lost_worker_each_once_an_epoch(
    new_world: Any, tmp_path: Path, kind: str, num_workers: int
) -> None:
    world = new_world(3)
    world.push(kind=kind, num_workers=num_workers, place=str(tmp_path))
    text = training(batch=2, weights=False, optimizer=ADAM)
    outcome = world.ok(text[: text.index("losses, step = ")] + LEDGER, plan="async-ps:4")
    lines = [[int(row) for row in line.split()] for line in (tmp_path / "rows").read_text().splitlines()]
    first, second = world.pull("seen", 0), world.pull("seen", 2)
    # Its first round of four steps had come, and what it is slow for is shorter: one or two steps of the next ones, too.
    [rounds] = re.findall(r"(\d+) \(lost\)", outcome.text(0, "stderr"))
    sent = 4 if rounds == "1" else 5 if {*lines[5]} & {*first[0], *second[0]} else 6
    for epoch in range(3):
        counted = Counter(
            [*first[epoch], *second[epoch], *(row for line in lines[:sent] for row in line if epoch == 0)]
        )
        repeated = 2 if kind == "prepared" else 0  # 64 rows fill no 11 batches of 6: Accelerate fills up the last one
        assert set(counted) == set(range(64)) and counted.total() == 64 + repeated
    assert world.pull("steps", 0) == world.pull("steps", 2)
    assert world.pull("sizes", 0) == world.pull("sizes", 2)


def test_a_server_that_is_killed_ends_the_run_with_its_name(new_world: Any) -> None:
    world = new_world(2)
    world.push(loser=0)
    text = training(batch=2, weights=False, optimizer=ADAM)
    outcome = world.run(text[: text.index("losses, step = ")] + STEPS, plan="async-ps:4")
    assert outcome.state == "failed" and outcome.error["rank"] == 0


@pytest.mark.soak
def test_where_it_may_restart_it_goes_on_from_its_newest_checkpoint_with_all_workers(new_world: Any) -> None:
    world = new_world(3)
    killed = "import os; run.checkpoint() if step % 4 == 0 else None; "
    killed += "os.kill(os.getpid(), 9) if rank == 1 and step == 10 and not run.resumed_step else None"
    cell = training(batch=2, epochs=2, optimizer=ADAM, after=killed)
    outcome = world.ok(cell, plan="async-ps:4", max_restarts=1)
    assert outcome.record.num_restarts == 1
    losses = world.pull("losses")
    assert len(losses) == 22 and mean(losses[-5:]) < mean(losses[:5])
    hold_the_same(world, [0, 1, 2])
