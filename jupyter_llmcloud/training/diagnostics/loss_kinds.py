"""Whether a loss is a mean over its rows, so that a share of them has that share of the gradient; read from its graph.

A sum over the rows of a rank, whatever it is divided by afterwards, is none: of how many rows, or tokens, and on which
ranks, that number was counted, no graph tells. A mean may be one over what the rows hold, of which some have more than
others: the targets that are not ignored, or what a mask has picked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

_MEAN, _SUM = 1, 2  # as torch saves reduction="mean" and "sum" in the graphs of its own losses
_PASSED = (
    *("AddBackward", "SubBackward", "MulBackward", "DivBackward", "NegBackward", "ToCopyBackward", "StackBackward"),
    *("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "SqueezeBackward", "UnsqueezeBackward"),
    *("CloneBackward", "AliasBackward", "ExpandBackward", "_DDPSinkBackward"),
)
_SUMS = ("SumBackward", "NansumBackward")
_OF_WEIGHTS = (*_PASSED, *_SUMS, "PowBackward", "AbsBackward", "SqrtBackward", "LinalgVectorNormBackward")
_OF_SMOOTHING = ("MaskedFillBackward", "NegBackward", "MulBackward", *_SUMS)
_MEANS = ("MeanBackward",)
_PICKS = ("IndexBackward", "MaskedSelectBackward")
_OF_PICKED = (*_PASSED, "PowBackward", "AbsBackward", "ExpBackward", "LogBackward", "SqrtBackward")


@dataclass
class LossKind:
    """What the graph of a loss says of it.

    Attributes:
        is_sum: a part of it is a sum over data. One of weights alone, which decays them, is the same on all ranks.
        is_mean: it is none, and a part of it is a mean.
        counts: of each mean over what rows may hold unlike numbers of, how many there are: a number, or a tensor of it.
        divisors: by which parts of it are divided.
    """

    is_sum: bool = False
    is_mean: bool = False
    counts: list[Any] = field(default_factory=list)
    divisors: list[torch.Tensor] = field(default_factory=list)

    def may_be_over(self, count: torch.Tensor) -> bool:
        """Whether it is a sum that is divided by this count, or shows nothing, as one that was compiled.

        Values are read, which waits for a GPU, only where a divisor is not the tensor itself.
        """
        if not self.is_sum:
            return not self.is_mean
        numbers = [divisor for divisor in self.divisors if divisor.numel() == 1]
        if any(divisor.data_ptr() == count.data_ptr() for divisor in numbers):
            return True
        return any(float(divisor) == float(count) for divisor in numbers)


def sums_rows(loss: torch.Tensor) -> bool:
    """Whether a part of it is a sum over data."""
    return kind_of_loss(loss).is_sum


def kind_of_loss(loss: torch.Tensor) -> LossKind:
    """Read its graph, from its end to the first sums and means."""
    sums, mean_of, waiting, seen = list[Any](), set[Any](), [loss.grad_fn], set[Any]()
    means, divisors, is_sum = list[Any](), list[torch.Tensor](), False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (reduction := getattr(node, "_saved_reduction", None)) == _SUM:
            is_sum = True
        elif reduction == _MEAN:
            mean_of.update(_inputs(node))
            means.append(node)
        elif _is(node, _MEANS) and not _is_of_scalars(node):
            means.append(node)
        elif _is(node, _SUMS) and not _is_of_scalars(node):
            sums.append(node)
        elif _is(node, (*_PASSED, *_SUMS, *_MEANS)):
            waiting += _inputs(node)
            if _is(node, ("DivBackward",)) and isinstance(other := getattr(node, "_saved_other", None), torch.Tensor):
                divisors.append(other)
    if is_sum or any(not (_leads_to_weights(node) or _smooths(node, mean_of)) for node in sums):
        return LossKind(is_sum=True, divisors=divisors)
    counts = [count for node in means if (count := _count_of(node)) is not None]
    return LossKind(is_mean=bool(means), counts=counts, divisors=divisors)


def _count_of(node: Any) -> Any:
    """Over how many it is a mean, where that depends on what the rows hold: targets, by their weights, or picked."""
    if (total := getattr(node, "_saved_total_weight", None)) is not None:  # of a cross entropy
        return total
    if not any(_is(end, _PICKS) for inner in _inputs(node) for end in _ends(inner, _OF_PICKED)):
        return None
    if (number := getattr(node, "_saved_self_sym_numel", None)) is not None:
        return number
    saved = getattr(node, "_saved_self", None)
    return saved.numel() if isinstance(saved, torch.Tensor) else None


def _is(node: Any, names: tuple[str, ...]) -> bool:
    return type(node).__name__.rstrip("0123456789") in names


def _inputs(node: Any) -> Iterator[Any]:
    return (inner for inner, _ in node.next_functions if inner is not None)


def _is_of_scalars(node: Any) -> bool:
    """Such as `torch.stack(losses).sum()`."""
    return all(_is(inner, ("StackBackward",)) for inner in _inputs(node))


def _leads_to_weights(node: Any) -> bool:
    return all(type(end).__name__ == "AccumulateGrad" for end in _ends(node, _OF_WEIGHTS))


def _smooths(node: Any, mean_of: set[Any]) -> bool:
    """Whether it is the part of a cross entropy with label_smoothing, itself a mean, which torch writes as a sum."""
    return all(end in mean_of for end in _ends(node, _OF_SMOOTHING))


def _ends(node: Any, passed: tuple[str, ...]) -> Iterable[Any]:
    """The nodes behind those that are passed."""
    waiting, seen = [node], set[Any]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is(node, passed):
            waiting += _inputs(node)
        else:
            yield node
