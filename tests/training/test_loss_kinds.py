"""A loss that is a mean over its rows is told from a sum, by the graph that torch has made of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jupyter_llmcloud.training.diagnostics.loss_kinds import kind_of_loss, sums_rows

MODEL = torch.nn.Linear(3, 5)
ROWS = torch.randn(4, 3)
CLASSES = torch.tensor([1, 2, 3, -100])
LIKELY = torch.rand(4, 5)
Loss = Callable[[Tensor], Tensor]

MEANS: dict[str, Loss] = {
    "mean": lambda out: out.square().mean(),
    "sum of a row, mean of rows": lambda out: out.square().sum(-1).mean(),
    "cross entropy": lambda out: F.cross_entropy(out, CLASSES),
    "smoothed": lambda out: F.cross_entropy(out, CLASSES, label_smoothing=0.1),
    "smoothed, weighted": lambda out: F.cross_entropy(out, CLASSES, weight=torch.rand(5), label_smoothing=0.1),
    "weighted classes": lambda out: F.cross_entropy(out, CLASSES, weight=torch.rand(5)),
    "mse": lambda out: F.mse_loss(out, LIKELY),
    "bce": lambda out: F.binary_cross_entropy_with_logits(out, LIKELY),
    "scaled": lambda out: out.mean() * 65536.0 / 8,
    "two means": lambda out: torch.stack([out.mean(), out.square().mean()]).sum(),
    "weights decayed": lambda out: out.mean() + 0.1 * sum(p.pow(2).sum() for p in MODEL.parameters()),
    "norm of weights": lambda out: out.mean() + MODEL.weight.abs().sum() / 7,
}
SUMS: dict[str, Loss] = {
    "sum": lambda out: out.square().sum(),
    "cross entropy": lambda out: F.cross_entropy(out, CLASSES, reduction="sum"),
    "mse": lambda out: F.mse_loss(out, LIKELY, reduction="sum"),
    "by the tokens of all ranks": lambda out: F.cross_entropy(out, CLASSES, reduction="sum") * 2 / torch.tensor(9),
    "by a mask": lambda out: (out.mean(-1) * torch.tensor([1.0, 1, 0, 1])).sum() / 3,
    "beside a mean of the same": lambda out: F.cross_entropy(out, CLASSES) + out.log_softmax(-1).exp().sum(),
    "one of two": lambda out: F.mse_loss(out, LIKELY) + 0.01 * out.exp().sum(),
    "of an activation and weights": lambda out: (out.sum(0) * MODEL.bias).sum(),
}


@pytest.mark.parametrize("loss", MEANS.values(), ids=list(MEANS))
def test_a_mean_is_none(loss: Loss) -> None:
    assert not sums_rows(loss(MODEL(ROWS)))


@pytest.mark.parametrize("loss", SUMS.values(), ids=list(SUMS))
def test_a_sum_is_one_whatever_it_is_divided_by(loss: Loss) -> None:
    assert sums_rows(loss(MODEL(ROWS)))


MASK = torch.tensor([True, False, True, True])
COUNTED: dict[str, tuple[Loss, list[float]]] = {
    "targets that are ignored": (lambda out: F.cross_entropy(out, CLASSES) * 2 / 8, [3]),
    "beside another mean": (lambda out: F.nll_loss(out.log_softmax(-1), CLASSES) + out.mean(), [3]),
    "weighted classes": (lambda out: F.cross_entropy(out, CLASSES, weight=torch.tensor([1, 2, 3, 4, 5.0])), [9]),
    "mean of a mask": (lambda out: (out - LIKELY).square()[MASK].mean(), [15]),
    "mean of masked parts": (lambda out: (out[MASK] - LIKELY[MASK]).pow(2).mean(), [15]),
    "loss of masked parts": (lambda out: F.mse_loss(out[MASK], LIKELY[MASK]), [15]),
    "masked_select": (lambda out: out.masked_select(MASK[:, None]).mean(), [15]),
    "mean": (lambda out: out.square().mean(), []),
    "mse": (lambda out: F.mse_loss(out, LIKELY), []),
}


@pytest.mark.parametrize(("loss", "counts"), COUNTED.values(), ids=list(COUNTED))
def test_a_mean_over_what_rows_have_unlike_numbers_of_is_counted(loss: Loss, counts: list[float]) -> None:
    kind = kind_of_loss(loss(MODEL(ROWS)))
    assert kind.is_mean and [float(count) for count in kind.counts] == counts


def test_a_sum_that_is_divided_by_a_count_is_known_by_that() -> None:
    count = torch.tensor(9)
    out = MODEL(ROWS)
    for loss in (
        F.cross_entropy(out, CLASSES, reduction="sum") / count * 2,
        F.cross_entropy(out, CLASSES, reduction="sum") / 9 + out.mean(),
        0.9 * (-out.log_softmax(-1)[:, 0].sum() / count) + 0.1 * (out.sum() / (count * 5)),
    ):
        assert kind_of_loss(loss).may_be_over(count)
    for loss in (
        out.mean(),
        out.mean() / 9,
        F.kl_div(out.log_softmax(-1), LIKELY, reduction="batchmean"),
        out.sum() / 8,
    ):
        assert not kind_of_loss(loss).may_be_over(count)


def test_what_no_graph_tells_is_neither_a_mean_nor_a_sum() -> None:
    """As of a compiled model that computes its loss itself."""
    kind = kind_of_loss(MODEL(ROWS).logsumexp((0, 1)))
    assert not kind.is_mean and not kind.is_sum and kind.may_be_over(torch.tensor(9))


def test_a_tensor_without_a_graph_is_none() -> None:
    assert not sums_rows(torch.tensor(1.0))
    assert not sums_rows(MODEL.weight)
