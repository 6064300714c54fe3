"""What a trial of a population leaves and the next one goes on from: as one training, but for what is searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.search import turns


class Training:
    """A small net with its optimizer, schedule and loader, as a cell makes them."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.9) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)
        self.loader = DataLoader(TensorDataset(torch.arange(16.0)), 4, shuffle=True, generator=torch.Generator())

    @property
    def objects(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "loader")}

    def epochs(self, number: int) -> list[float]:
        losses = []
        for _ in range(number):
            for (rows,) in self.loader:
                loss = (self.model(rows[:, None].expand(-1, 4) / 16) - 1).square().mean()
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.item())
            self.schedule.step()
        return losses


def test_turns_of_one_member_train_what_one_training_does(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = Training().epochs(6)
    torch.manual_seed(3)
    parts: list[float] = []
    for turn in range(3):
        training = Training()
        if turn:
            torch.manual_seed(99)  # a trial has random numbers of its own
            assert turns.restore(tmp_path, 0, 1, turn - 1, training.objects) == {"epoch": 2 * turn}
        parts += training.epochs(2)
        turns.save(tmp_path, 0, 1, {**training.objects, "epoch": 2 * turn + 2})
    assert parts == whole


def test_what_is_searched_stays_as_the_cell_has_made_it(tmp_path: Path) -> None:
    parent = Training(lr=0.1, momentum=0.9)
    parent.epochs(2)
    turns.save(tmp_path, 0, 1, parent.objects)
    child = Training(lr=0.4, momentum=0.5)
    turns.restore(tmp_path, 0, 1, 7, child.objects)
    (group,) = child.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.4 / 4) and group["momentum"] == 0.5 and group["initial_lr"] == 0.4
    assert child.schedule.last_epoch == 2 and child.schedule.get_last_lr() == [group["lr"]]
    child.schedule.step()
    assert group["lr"] == pytest.approx(0.4 / 8)
    moments = [state["momentum_buffer"] for state in child.optimizer.state.values()]
    assert all(
        torch.equal(a, b["momentum_buffer"]) for a, b in zip(moments, parent.optimizer.state.values(), strict=True)
    )


def test_without_the_schedule_the_rate_is_that_of_the_trial(tmp_path: Path) -> None:
    parent = Training(lr=0.1)
    parent.epochs(2)
    turns.save(tmp_path, 0, 1, {"model": parent.model, "optimizer": parent.optimizer})
    child = Training(lr=0.4)
    turns.restore(tmp_path, 0, 1, 7, {"model": child.model, "optimizer": child.optimizer})
    assert child.optimizer.param_groups[0]["lr"] == 0.4


def test_what_is_not_put_back_or_was_not_kept_is_named(tmp_path: Path) -> None:
    one = Training()
    turns.save(tmp_path, 0, 1, {"model": one.model, "optimizer": one.optimizer, "epoch": 3})
    with pytest.raises(UsageError, match=r"'optimizer' is not put back: call trial.restore\(model=model, optimizer="):
        turns.restore(tmp_path, 0, 1, 4, {"model": one.model})
    with pytest.raises(UsageError, match=r"trial 4 has saved no 'loader' \(model, optimizer\)"):
        turns.restore(tmp_path, 0, 1, 4, one.objects)
    with pytest.raises(UsageError, match="ran on 1 ranks, and this one has 2"):
        turns.restore(tmp_path, 0, 2, 4, {"model": one.model, "optimizer": one.optimizer})
    with pytest.raises(UsageError, match="trial 4 has left no state of rank 1"):
        turns.restore(tmp_path, 1, 2, 4, {"model": one.model})
    with pytest.raises(UsageError, match=r"trial\.save cannot keep this: thing holds a builtins.object"):
        turns.save(tmp_path, 0, 1, {"thing": object()})


def test_a_state_of_another_shape_says_which_values_stay_with_it(tmp_path: Path) -> None:
    turns.save(tmp_path, 0, 1, {"model": torch.nn.Linear(4, 1)})
    with pytest.raises(UsageError, match=r"state of trial 2 does not fit: .*size mismatch.*trial.keep\('width'"):
        turns.restore(tmp_path, 0, 1, 2, {"model": torch.nn.Linear(8, 1)})


def test_weights_that_are_not_finite_are_not_left_for_others(tmp_path: Path) -> None:
    one = Training()
    with torch.no_grad():
        next(one.model.parameters()).fill_(float("nan"))
    with pytest.raises(UsageError, match=r"0\.weight.*not finite; nobody could go on from there"):
        turns.save(tmp_path, 0, 1, {"model": one.model})
