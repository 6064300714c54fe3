"""A compiled model under a plan: what is compiled is what the ranks have of it, and its optimizer trains that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.worlds import Ranks

BODY = """
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Halves(nn.Sequential):
    tp_plan = {"0": "colwise", "2": "rowwise"}

torch.manual_seed(1)
accelerator = Accelerator(DYNAMO)
model = Halves(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
model = COMPILED
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
torch.manual_seed(2)
rows = TensorDataset(torch.randn(48, 6), torch.randint(3, (48,)))
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=BATCH))
losses = []
for x, y in loader:
    loss = nn.functional.cross_entropy(model(x), y)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.gather(loss.detach()[None]).mean().item())
state = {name: value.tolist() for name, value in accelerator.get_state_dict(model).items()}
"""


def body(batch: int, compiled: str) -> str:
    by_cell = "torch.compile(model, backend='eager')" if compiled == "by the cell" else "model"
    by_accelerate = "dynamo_backend='eager'" if compiled == "by Accelerate" else ""
    return BODY.replace("BATCH", str(batch)).replace("COMPILED", by_cell).replace("DYNAMO", by_accelerate)


@pytest.mark.parametrize("compiled", ["by the cell", "by Accelerate"])
def test_a_compiled_model_trains_under_every_plan_what_one_process_trains(
    new_world: Callable[..., Ranks], compiled: str
) -> None:
    alone, two = new_world(1), new_world(2)
    for batch, plans in ((8, ("fsdp", "local-sgd:1")), (4, ("tp:2", "pipeline:2"))):
        alone.ok(body(batch, ""))
        wanted, state = alone.pull("losses"), alone.pull("state")
        for plan in plans:
            outcome = two.ok(body(4, compiled), plan=plan)
            assert two.pull("losses") == pytest.approx(wanted, abs=1e-5), plan
            found = two.pull("state")
            assert found.keys() == state.keys(), plan
            assert found["0.bias"] == pytest.approx(state["0.bias"], abs=1e-5), plan
            assert ("parts of a model are not compiled" in outcome.text(kind="stderr")) is (plan == "pipeline:2")
