"""Ranks that compute one batch together compare what they were given, by values."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.strategies import same_batches
from jupyter_llmcloud.training.parallel.strategies.same_batches import SameBatches

IDS = torch.arange(12).reshape(3, 4)


def told(**tensors: torch.Tensor) -> list[Any]:
    return [same_batches._told(name, tensor) for name, tensor in tensors.items()]


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"ids": IDS, "x": torch.ones(3)}, ""),
        ({"ids": IDS, "x": torch.ones(3) * (1 + 1e-6)}, ""),
        ({"ids": IDS.flip(0), "x": torch.ones(3)}, "ids"),
        ({"ids": IDS, "x": torch.ones(3) * 2}, "x"),
        ({"ids": IDS[:2], "x": torch.ones(3)}, "ids"),
        ({"ids": IDS}, "x"),
    ],
)
def test_what_differs_is_named(other: dict[str, torch.Tensor], found: str) -> None:
    assert same_batches.differing(told(ids=IDS, x=torch.ones(3)), told(**other)) == found


def test_numbers_that_are_none_and_flags_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    one = told(x=torch.tensor([float("nan"), 1.0]), mask=torch.tensor([True, False]), half=torch.ones(2).bfloat16())
    assert same_batches.differing(one, one) == ""


class Ranks:
    """Four ranks of which this is the last; ranks 2 and 3 share a batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_compared = 0
        self.is_other = False
        monkeypatch.setattr(dist, "get_world_size", lambda: 4)
        monkeypatch.setattr(dist, "get_rank", lambda: 3)
        monkeypatch.setattr(dist, "all_gather_object", self._gather)

    def _gather(self, every: list[Any], own: Any) -> None:
        self.num_compared += 1
        every[:] = [
            told(ids=IDS * 3),
            told(ids=IDS * 3),
            told(**{"argument 1": IDS * 2}) if self.is_other else own,
            own,
        ]


def test_ranks_compare_seldom_and_only_within_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    batches = SameBatches("tp+fsdp:2", 2)
    model = torch.nn.Identity()
    model.register_forward_pre_hook(batches.look, with_kwargs=True)
    model(IDS)
    assert ranks.num_compared == 0
    batches.begin()
    for _ in range(1000):
        model(IDS)
    assert ranks.num_compared == 10
    ranks.is_other = True
    with torch.no_grad(), pytest.raises(UsageError, match=r"ranks 2 to 3 .* another argument 1 .*rank // 2"):
        model(IDS)  # the first that is evaluated
    batches.close()
    model(IDS)


def test_a_copy_of_a_model_compares_with_it_and_one_in_a_file_does_not() -> None:
    batches = SameBatches("tp:2", 2)
    batches.begin()
    model = torch.nn.Identity()
    model.register_forward_pre_hook(batches.look, with_kwargs=True)
    (hook,) = copy.deepcopy(model)._forward_pre_hooks.values()
    assert hook.__self__ is batches
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(IDS), IDS)
