"""Whether a loss is a mean over its rows, so that a share of them has that share of the gradient; read from its graph.

A sum over the rows of a rank, whatever it is divided by afterwards, is none: of how many rows, or tokens, and on which
ranks, that number was counted, no graph tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def sums_rows(loss: torch.Tensor) -> bool:
    """Whether a part of it is a sum over data. One of weights alone, which decays them, is the same on all ranks."""
    sums, mean_of, waiting, seen = list[Any](), set[Any](), [loss.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (reduction := getattr(node, "_saved_reduction", None)) == _SUM:
            return True
        if reduction == _MEAN:
            mean_of.update(_inputs(node))
        elif _is(node, _SUMS) and not _is_of_scalars(node):
            sums.append(node)
        elif _is(node, (*_PASSED, *_SUMS)):
            waiting += _inputs(node)
    return any(not (_leads_to_weights(node) or _smooths(node, mean_of)) for node in sums)


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
