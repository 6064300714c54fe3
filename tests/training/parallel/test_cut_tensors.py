"""What a cell does with tensors of which its rank has a part: as with whole ones, or a word before a wrong number."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator

import pytest

from tests.support.worlds import AgentProcess, Ranks

BODY = """
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Halves(nn.Sequential):
    tp_plan = {"0": "colwise", "2": "rowwise"}

torch.manual_seed(1)
accelerator = Accelerator()
model = Halves(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3))
SETUP
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
torch.manual_seed(2)
rows = TensorDataset(torch.randn(32, 6), torch.randint(3, (32,)))
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=BATCH))
losses = []
for step, (x, y) in enumerate(loader):
    loss = nn.functional.cross_entropy(model(x), y)
    accelerator.backward(loss)
    BETWEEN
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.gather(loss.detach()[None]).mean().item())
"""


def body(batch: int, between: str = "", setup: str = "") -> str:
    return BODY.replace("BATCH", str(batch)).replace("BETWEEN", between).replace("SETUP", setup)


@pytest.fixture(scope="module")
def two(node_agent: AgentProcess) -> Iterator[Ranks]:
    ranks = Ranks(node_agent, 2)
    yield ranks
    ranks.end()


@pytest.mark.parametrize(("plan", "batch"), [("fsdp", 4), ("tp:2", 8)])
def test_values_of_gradients_are_clipped_whether_they_are_cut_or_not(
    new_world: Callable[..., Ranks], two: Ranks, plan: str, batch: int
) -> None:
    alone = new_world(1)
    clip = "accelerator.clip_grad_value_(model.parameters(), 0.02)"
    alone.ok(body(8, clip))
    two.ok(body(batch, clip), plan=plan)
    assert two.pull("losses") == pytest.approx(alone.pull("losses"), abs=1e-5)


@pytest.mark.parametrize("plan", ["fsdp", "tp:2"])
@pytest.mark.parametrize("number", ["float(norm)", "norm.item()"])
def test_a_number_of_which_a_rank_has_a_part_is_refused(two: Ranks, plan: str, number: str) -> None:
    error = two.run(body(4, f"norm = model[0].weight.grad.norm(); {number}"), plan=plan).error
    assert error["ename"] == "UsageError", error
    assert "this rank has a part of the number only" in error["evalue"]


def test_a_number_of_the_whole_is_given(new_world: Callable[..., Ranks], two: Ranks) -> None:
    alone = new_world(1)
    alone.ok(body(8, "norm = float(accelerator.unwrap_model(model)[0].weight.grad.norm())"))
    two.ok(body(4, "norm = float(model[0].weight.grad.norm().full_tensor())"), plan="fsdp")
    assert two.pull("norm", 1) == pytest.approx(alone.pull("norm"), abs=1e-6)


@pytest.mark.parametrize("plan", ["tp:2", "fsdp", "pipeline:2"])
def test_a_gradient_of_a_gradient_is_refused_where_it_would_be_another_one(two: Ranks, plan: str) -> None:
    penalty = "x.requires_grad_(); torch.autograd.grad(model(x).sum(), x, create_graph=True)"
    error = two.run(body(4, penalty), plan=plan).error
    assert error["ename"] == "UsageError", error
    assert "gradients of gradients (create_graph=True, as for a gradient penalty)" in error["evalue"]


def test_a_gradient_of_a_gradient_of_what_no_plan_has_cut_is_taken(two: Ranks) -> None:
    other = "z = torch.ones(2, requires_grad=True); g, = torch.autograd.grad((z**3).sum(), z, create_graph=True)"
    two.ok(body(4, f"{other}; g.sum().backward(); second = z.grad.tolist()"), plan="tp:2")
    assert two.pull("second") == [6, 6]


def test_what_is_thawed_later_is_averaged_between_replicas(new_world: Callable[..., Ranks], two: Ranks) -> None:
    alone = new_world(1)
    freezes = "model[0].requires_grad_(False)"
    thaws = "step == 1 and model.requires_grad_(True)"
    alone.ok(body(8, thaws, freezes))
    two.ok(body(4, thaws, freezes), plan="local-sgd:1")
    assert two.pull("losses") == pytest.approx(alone.pull("losses"), abs=1e-5)


@pytest.mark.parametrize("plan", ["local-sgd:2", "diloco:2"])
def test_a_pass_that_is_longer_for_some_replicas_is_refused_when_it_trains(two: Ranks, plan: str) -> None:
    uneven = body(4).replace(
        "Accelerator()", "Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))"
    )
    uneven = uneven.replace("import Accelerator", "import Accelerator, DataLoaderConfiguration")
    uneven = uneven.replace("randn(32, 6)", "randn(36, 6)").replace("(32,)", "(36,)")
    error = two.run(uneven, plan=plan).error
    assert error["ename"] == "UsageError", error
    assert "one batch longer for 1 of 2 ranks" in error["evalue"]
    evaluates = uneven.replace("accelerator.backward", "bool").replace("optimizer.step()", "")
    two.ok(evaluates.replace("accelerator.gather(loss.detach()[None]).mean()", "loss"), plan=plan)


def test_what_ranks_of_one_batch_have_is_counted_once_by_the_functions_beside_an_accelerator_too(two: Ranks) -> None:
    asks = """
    from accelerate.utils import gather, gather_object, reduce
    rows = torch.tensor([1.0, 2.0])
    each = [accelerator, __import__("types").SimpleNamespace(gather=gather, reduce=reduce)]
    found = [[one.gather(rows).tolist(), one.reduce(rows, "sum").tolist(), one.reduce(rows, "mean").tolist()]
             for one in each] + [gather_object(["a"])]
    """
    for plan, wanted in (("tp:2", [[1, 2], [1, 2], [1, 2]]), ("fsdp", [[1, 2, 1, 2], [2, 4], [1, 2]])):
        two.ok(body(4) + textwrap.dedent(asks), plan=plan)
        assert two.pull("found") == [wanted, wanted, ["a"] * (len(wanted[0]) // 2)]
