"""Lightning and Fabric in a cell: one model over all ranks, a chart, checkpoints, and a saved model."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.worlds import Ranks

pytestmark = pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed (extra: compat)")

NET = """
import torch, lightning as L
from torch.utils.data import DataLoader, TensorDataset

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
    def training_step(self, batch, i):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

x = torch.randn(64, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False)
"""
FIT = """
net = Net()
trainer = L.Trainer(max_epochs=2, log_every_n_steps=2, **quiet, **{options})
trainer.fit(net, loader)
result = (trainer.world_size, type(trainer.strategy).__name__, trainer.global_step,
          trainer.train_dataloader.batch_size, net.layer.weight.tolist())
"""
FABRIC = """
from lightning import Fabric
fabric = Fabric(**{options})
fabric.launch()
model = torch.nn.Linear(8, 1)
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
prepared, seen = fabric.setup_dataloaders(loader), []
for step, (a, b) in enumerate(prepared):
    loss = torch.nn.functional.mse_loss(model(a), b)
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    fabric.log("loss", loss, step=step)
    seen.append(len(a))
result = (fabric.world_size, type(fabric.strategy).__name__, seen, model.weight.tolist())
"""
PASTED = ["{}", "{'strategy': 'ddp'}", "{'strategy': 'ddp_notebook', 'devices': 2}", "{'devices': 1}",
          "{'strategy': 'ddp_spawn', 'accelerator': 'cpu', 'devices': 4}"]  # fmt: skip


@pytest.mark.parametrize("options", PASTED)
def test_a_lightning_trainer_trains_one_model_over_all_ranks(world: Ranks, options: str) -> None:
    outcome = world.ok(NET + FIT.format(options=options))
    first, second = world.pull("result"), world.pull("result", 1)
    assert first[:4] == second[:4] == (2, "DDPStrategy", 16, 4)
    assert first[4] == second[4]
    assert len(outcome.values("loss")) == len(outcome.values("loss", 1)) == 8
    assert [row["progress"] for _, row in outcome.metrics if "progress" in row][-1] == [16, 16]
    assert ("%world resize" in outcome.text(0, "stderr")) == ("'devices': 1" in options or "'devices': 4" in options)


@pytest.mark.parametrize("options", PASTED)
def test_fabric_trains_one_model_over_all_ranks(world: Ranks, options: str) -> None:
    outcome = world.ok(NET + FABRIC.format(options=options))
    first, second = world.pull("result"), world.pull("result", 1)
    assert first == second
    assert first[:3] == (2, "DDPStrategy", [4] * 8)
    assert len(outcome.values("loss")) == 8


@pytest.mark.alone
def test_a_stop_inside_fit_is_a_stop(world: Ranks) -> None:
    code = """
class Slow(Net):
    def training_step(self, batch, i):
        time.sleep(0.02)
        if i == 3:
            print("in it")
        return super().training_step(batch, i)

import time
net = Slow()
trainer = L.Trainer(max_epochs=1000, **quiet)
trainer.fit(net, loader)
"""
    stopped = world.send(NET + code).wait_for("in it", 2).stop().end()
    assert stopped.state == "stopped"
    assert stopped.report == "ranks 0-1: stopped, variables kept"
    assert stopped.seconds < 2
    assert len(set(world.ok("trainer.global_step").results())) == 1
    world.ok(NET + FIT.format(options="{}"))


def test_on_one_rank_of_two_lightning_trains_by_itself(world: Ranks) -> None:
    world.ok(NET + FIT.format(options="{}"), ranks=[0])
    assert world.pull("result")[:3] == (1, "SingleDeviceStrategy", 32)


def test_what_is_replaced_of_lightning_is_as_it_was_written_for(world: Ranks) -> None:
    outcome = world.ok(
        """
        import lightning.fabric, lightning.pytorch
        from jupyter_llmcloud.training import patches
        for patch in patches.LIGHTNING:
            if patch.module.startswith("lightning."):
                print(patch.problem(), len(patch._originals) == len(patch.targets))
        """
    )
    assert set(outcome.text(0).splitlines()) == {"None True"}
