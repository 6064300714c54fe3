"""Ranks that compute one batch together draw the same numbers for it, whatever each draws within its part of the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.planned_cells import LLAMA, training
from tests.support.worlds import Ranks

MODEL = """
import random, numpy as np, torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Halves(nn.Module):
    tp_plan = {"up": "colwise", "down": "rowwise"}
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)
    def forward(self, x):
        return self.down(self.drop(self.up(x)))

accelerator = Accelerator()
layers = [nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4)]
model = nn.Sequential(*layers) if PIPELINE else Halves()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
"""
BY_HAND = """
drawn = []
for _ in range(3):
    rows = torch.randint(100, (6,))
    drawn.append([random.random(), float(np.random.rand()), rows.tolist()])
    x = torch.nn.functional.one_hot(rows % 4, 4).float()
    accelerator.backward(nn.functional.mse_loss(model(x), x))
    optimizer.step()
    optimizer.zero_grad()
"""
WORKERS = """
class Augmented(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return torch.rand(4) + random.random() + float(np.random.rand())

loader = accelerator.prepare(DataLoader(Augmented(), batch_size=4, num_workers=2, shuffle=True))
drawn = []
for _ in range(2):
    for x in loader:
        drawn.append(x.tolist())
        accelerator.backward(nn.functional.mse_loss(model(x), x))
        optimizer.step()
"""


@pytest.mark.parametrize("body", [BY_HAND, WORKERS], ids=["by hand", "in workers"])
@pytest.mark.parametrize("seed", [None, 3], ids=["unseeded", "seeded"])
@pytest.mark.parametrize("plan", ["tp:2", "pipeline:2"])
def test_ranks_that_share_a_batch_draw_the_same_one(world: Ranks, plan: str, seed: int | None, body: str) -> None:
    world.ok(f"PIPELINE = {plan.startswith('pipeline')}\n{MODEL}{body}", plan=plan, seed=seed)
    drawn = world.pull("drawn", 0)
    assert world.pull("drawn", 1) == drawn
    assert all(one != other for one, other in itertools.pairwise(drawn))


@pytest.mark.parametrize("seed", [None, 3], ids=["unseeded", "seeded"])
def test_ranks_that_share_no_batch_draw_other_ones(new_world: Any, seed: int | None) -> None:
    world = new_world(4)
    world.ok(f"PIPELINE = False\n{MODEL}{BY_HAND}", plan="tp+fsdp", seed=seed)
    first, second, third, fourth = (world.pull("drawn", rank) for rank in range(4))
    assert first == second and third == fourth
    own = 2 if seed is None else 3  # torch's generator is alike in all processes until somebody seeds it
    for one, other in zip(first[1:], third[1:], strict=True):
        assert all(number != another for number, another in zip(one[:own], other[:own], strict=True))


def test_what_stages_drop_differs_from_step_to_step_and_between_them(world: Ranks) -> None:
    world.ok(
        """
        import torch
        from accelerate import Accelerator
        from torch import nn

        class Dropped(nn.Dropout):
            def forward(self, x):
                found = super().forward(x)
                masks.append((found != 0).flatten().tolist())
                return found

        masks = []
        model = Accelerator().prepare(nn.Sequential(nn.Linear(64, 64), Dropped(0.5), nn.Linear(64, 64), Dropped(0.5)))
        for _ in range(3):
            model(torch.ones(1, 64))
        before = torch.get_rng_state()
        model.eval()
        model(torch.ones(1, 64))
        is_kept = torch.equal(before, torch.get_rng_state())
        """,
        plan="pipeline:2",
        seed=3,
    )
    masks = [str(mask) for rank in (0, 1) for mask in world.pull("masks", rank)[:3]]
    assert len(set(masks)) == 6
    assert world.pull("is_kept", 0)


def test_ranks_of_one_model_draw_alike_also_when_they_go_on_from_ranks_that_did_not(world: Ranks) -> None:
    """A run of `ddp` with a seed, whose ranks have parted, is resumed under `tp`."""
    cell = training(
        batch="8 if is_tp else 4", make=LLAMA.replace("torch.manual_seed({seed})", "import random, numpy as np"), weights=False,
        after="run.checkpoint() if step == 2 else None; assert step != 3 or is_tp",
    )  # fmt: skip
    drawn = "drawn = [torch.rand(2).tolist(), random.random(), float(np.random.rand())]\n"
    broken = world.run(f"is_tp = False\n{cell}", seed=3)
    assert broken.error["ename"] == "AssertionError"
    point = {"folder": str(broken.folder.path / "checkpoints" / "step-2"), "step": 2}
    world.ok(f"is_tp = True\n{cell}{drawn}", plan="tp:2", seed=3, resume=point)
    assert world.pull("drawn", 0) == world.pull("drawn", 1)


def test_texts_are_gathered_once_from_ranks_that_share_a_batch(world: Ranks) -> None:
    world.ok(
        """
        from accelerate import Accelerator
        from torch.utils.data import DataLoader
        accelerator = Accelerator()
        loader = accelerator.prepare(DataLoader([f"row {at}" for at in range(5)], batch_size=2))
        found = [text for batch in loader for text in accelerator.gather_for_metrics(batch)]
        """,
        plan="tp:2",
    )
    assert world.pull("found") == [f"row {at}" for at in range(5)]
