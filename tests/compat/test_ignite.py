"""ignite in a cell: its launcher finds the ranks, whether it is told of processes or not."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.worlds import Ranks

pytestmark = pytest.mark.skipif(find_spec("ignite") is None, reason="pytorch-ignite is not installed")

TRAINING = """
import torch
import ignite.distributed as idist
from ignite.engine import create_supervised_trainer

def training(local_rank, config, lr=1.0):
    model = idist.auto_model(torch.nn.Linear(4, 2))
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr))
    rows = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    loader = idist.auto_dataloader(rows, batch_size=8)
    trainer = create_supervised_trainer(model, optimizer, torch.nn.CrossEntropyLoss())
    trainer.run(loader, max_epochs=2)
    global seen
    seen = (idist.get_rank(), idist.get_world_size(), idist.backend(), local_rank, config, trainer.state.iteration,
            idist.all_reduce(1), model.module.weight.tolist())
"""


@pytest.mark.parametrize("options", ["", ", nproc_per_node=2", ", nproc_per_node=4"])
def test_a_function_given_to_parallel_runs_on_the_ranks(world: Ranks, options: str) -> None:
    outcome = world.ok(
        f"{TRAINING}\nwith idist.Parallel(backend='gloo'{options}) as parallel:\n"
        "    parallel.run(training, {'a': 1}, lr=0.1)\nassert idist.get_world_size() == 2"
    )
    first, second = world.pull("seen"), world.pull("seen", 1)
    assert first[:-1] == (0, 2, "gloo", 0, {"a": 1}, 16, 2)
    assert second[:-1] == (1, 2, "gloo", 1, {"a": 1}, 16, 2)
    assert first[-1] == second[-1]
    assert ("%world resize 4" in outcome.text(0, "stderr")) == ("4" in options)
    world.ok("import torch.distributed as dist\ndist.all_reduce(torch.ones(1))")
