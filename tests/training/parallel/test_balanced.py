"""With `--balance` a slow rank takes fewer rows of the same global batches, and the model becomes the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jupyter_llmcloud.training.diagnostics import step_speed
from tests.support.worlds import AgentProcess, Ranks


def test_what_a_rank_waits_for_others_is_no_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a fast rank that waits in the first of two backward passes seems to be as slow as the one it waits for."""
    now = 1.0
    monkeypatch.setattr(step_speed.time, "perf_counter", lambda: now)

    def at(moment: float) -> None:
        nonlocal now
        now = 1.0 + moment

    speed = step_speed.StepSpeed()
    speed.asks()
    at(5)
    speed.waited(4)  # for the buffers of the first rank
    for gradient, ended in ((6, 10), (11, 20)):
        at(gradient)
        speed.note_gradient()
        at(ended)
        speed.backward_ended()
    assert speed.step.seconds == 1 + 1 + 1
    at(21)
    speed.after_step()
    at(23)
    speed.note_gradient()  # of another model, whose optimizer steps on the same batch
    speed.after_step()
    at(30)
    speed.asks()
    at(31)
    speed.note_gradient()
    speed.after_step()
    assert speed.window.seconds == 1  # the two before were to warm up


# A forward pass that takes a rank a time for each row: a machine of known speed, also under load.
CELL = """
import time, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
    def forward(self, x):
        if self.training:
            time.sleep(len(x) * cost)
        return self.layer(x.tanh())

torch.manual_seed(0)
model = Slow().double()
data = TensorDataset(torch.arange(168.0, dtype=torch.float64).reshape(42, 4))
accelerator = Accelerator(gradient_accumulation_steps={accumulate})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(data, batch_size={batch}, shuffle={shuffle}, num_workers={workers})
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
sizes, seen, counted, started = [], [], [], time.perf_counter()
for epoch in range({epochs}):
    model.train()
    for (rows,) in loader:
        with accelerator.accumulate(model):
            loss = model(rows).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        sizes.append(len(rows))
        seen.append(rows[:, 0].clone())
    model.eval()
    evaluated = torch.cat([accelerator.gather_for_metrics(rows[:, 0]) for (rows,) in loader])
took = time.perf_counter() - started
everything = accelerator.gather(torch.arange(1.0 + rank))
state = {{name: value.clone() for name, value in accelerator.get_state_dict(model).items()}}
"""


def cell(batch: int, epochs: int, accumulate: int = 1, workers: int = 0, shuffle: bool = False) -> str:
    return CELL.format(batch=batch, epochs=epochs, accumulate=accumulate, workers=workers, shuffle=shuffle)


@pytest.fixture(scope="module")
def two(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 2)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def alone(node_agent: AgentProcess) -> dict[int, Any]:
    """What one process makes of the same global batches."""
    ranks = Ranks(node_agent, 1)
    found = {}
    ranks.push(cost=0.0)
    for accumulate in (1, 2):
        # 42 rows in batches of 6 over both ranks: full ones only.
        ranks.ok(cell(6, 8, accumulate))
        found[accumulate] = ranks.pull("state")
    ranks.end()
    return found


def speeds(ranks: Ranks, *costs: float) -> None:
    for rank, cost in enumerate(costs):
        ranks.push([rank], cost=cost)


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), pytest.param(2, 0, marks=pytest.mark.story), (1, 1)])
def test_a_slow_rank_gets_fewer_rows_and_the_model_is_that_of_one_process(
    two: Ranks, alone: dict[int, Any], accumulate: int, workers: int
) -> None:
    speeds(two, 0.01, 0.05)
    two.ok(cell(3, 8, accumulate, workers), balance=True)
    sizes = [two.pull("sizes", rank) for rank in range(2)]
    assert sizes[0][0] == sizes[1][0] == 3
    assert sizes[0][-1] == 5 and sizes[1][-1] == 1
    assert all(a + b == 6 for a, b in zip(*sizes, strict=True))  # one global batch, whatever was drawn ahead
    seen = [torch.cat(parts) for parts in zip(two.pull("seen", 0), two.pull("seen", 1), strict=True)]
    assert torch.equal(torch.cat(seen), torch.arange(0.0, 168.0, 4).double().repeat(8))
    state = two.pull("state")
    for name, value in alone[accumulate].items():
        assert torch.allclose(state[name], value, atol=1e-9), name


CLIPPED = """            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
"""
SCALED = """            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
"""
STEP = "            optimizer.step()\n"
WAYS = {
    "clipped": lambda code: code.replace(STEP, CLIPPED),
    "scaled": lambda code: (
        code.replace("            accelerator.backward(loss)\n" + STEP, SCALED)
        .replace("torch.manual_seed(0)", "torch.manual_seed(0)\nscaler = torch.amp.GradScaler('cpu')")
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
def test_what_is_done_with_the_gradients_of_a_step_is_what_one_process_does(
    two: Ranks, node_agent: AgentProcess, way: str
) -> None:
    one = Ranks(node_agent, 1)
    one.push(cost=0.0)
    one.ok(WAYS[way](cell(6, 8)))
    wanted = one.pull("state")
    one.end()
    speeds(two, 0.01, 0.05)
    code = WAYS[way](cell(3, 8))
    assert code != cell(3, 8)
    two.ok(code, balance=True)
    assert [two.pull("sizes", rank)[-1] for rank in range(2)] == [5, 1]
    for name, value in two.pull("state").items():
        assert torch.allclose(value, wanted[name], atol=1e-9), name


SUM = 'loss = torch.nn.functional.mse_loss(model(rows), rows, reduction="sum")'
LOSSES = {
    "sum": SUM,
    "by the rows of all": f"{SUM} * world_size / accelerator.gather(torch.tensor(len(rows))).sum()",
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_a_loss_that_is_a_sum_keeps_its_rows_and_says_so(two: Ranks, loss: str) -> None:
    """A step would be another one with other shares, and nothing tells of which rows its count is."""
    code = cell(3, 4).replace("loss = model(rows).square().mean()", loss)
    code = code.replace(
        "everything = accelerator.gather(torch.arange(1.0 + rank))", ""
    )  # of other sizes, for --balance
    speeds(two, 0.01, 0.05)
    two.ok(code)
    wanted = two.pull("state")
    outcome = two.ok(code, balance=True)
    assert outcome.text(0, "stderr").count("--balance has no effect in this cell: the loss is a sum over its rows") == 1
    assert set(two.pull("sizes", 0)) == set(two.pull("sizes", 1)) == {3}
    for name, value in two.pull("state").items():
        assert torch.allclose(value, wanted[name], atol=1e-12), name


def test_what_is_evaluated_is_cut_evenly_and_gathered_whole(two: Ranks) -> None:
    speeds(two, 0.01, 0.05)
    two.ok(cell(4, 6, shuffle=True), balance=True)
    assert two.pull("sizes")[-1] > 4  # also the rows at the end that fill no batch
    assert two.pull("evaluated").sort().values.tolist() == [4.0 * row for row in range(42)]
    assert len(two.pull("everything")) == 3  # one row of the first rank, two of the other


def test_ranks_of_one_speed_and_cells_without_it_share_evenly(two: Ranks) -> None:
    speeds(two, 0.02, 0.02)
    two.ok(cell(3, 4), balance=True)
    assert set(two.pull("sizes")) == {3}
    speeds(two, 0.001, 0.005)
    two.ok(cell(3, 4).replace("torch.arange(1.0 + rank)", "torch.arange(2.0)"))
    assert set(two.pull("sizes")) == {3}


def test_a_step_of_several_loaders_keeps_its_rows_and_says_so(two: Ranks) -> None:
    speeds(two, 0.01, 0.05)
    two.ok(
        cell(3, 4)
        .replace("for (rows,) in loader:", "for (rows,), _ in zip(loader, other):", 1)
        .replace("sizes, seen", "other = accelerator.prepare(DataLoader(data, batch_size=2))\nsizes, seen"),
        balance=True,
    )
    assert set(two.pull("sizes")) == {3}
