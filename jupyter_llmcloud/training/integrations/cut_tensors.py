"""Tensors of which a rank has a part, in calls that torch answers with that part alone, wrongly, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE
from jupyter_llmcloud.training.parallel.strategies.base import Strategy

# What torch, its fully_shard, and our pipeline put into a graph where ranks exchange something.
_EXCHANGES = {
    *("_FromTorchTensorBackward", "_ToTorchTensorBackward", "RedistributeBackward"),
    *("RegisterPostBackwardFunctionBackward", "_BackwardBackward"),
}


def install() -> None:
    """Called once, in a rank; nothing is other than torch's while no plan cuts anything."""
    numbers = ("item", "tolist", "__float__", "__int__", "__bool__")
    patches.CUT_TENSORS.apply(
        {
            **{f"torch.nn.{module}:clip_grad_norm_": _make_clip_grad_norm for module in ("utils", "utils.clip_grad")},
            **{f"torch.nn.{module}:clip_grad_value_": _make_clip_grad_value for module in ("utils", "utils.clip_grad")},
            "torch.autograd:_engine_run_backward": _make_backward,
            **{f"torch.distributed.tensor:DTensor.{name}": _make_number for name in numbers},
        }
    )


def _strategy() -> Strategy | None:
    return ACTIVE.strategy


# --- clipping --------------------------------------------------------------------------------------------------------


def _make_clip_grad_norm(original: Any) -> Any:
    def clip_grad_norm_(
        parameters: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Any:
        strategy = _strategy()
        total_norm = getattr(strategy, "total_norm", None)
        tensors = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if total_norm is None:
            is_cut = strategy is not None and strategy.cuts_tensors
            clip = functools.partial(_clip_cut, original) if is_cut else original
            return clip(tensors, max_norm, norm_type, error_if_nonfinite, foreach)
        norm = total_norm(
            torch.nn.utils.get_total_norm([p.grad for p in tensors if p.grad is not None], norm_type), norm_type
        )
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(f"the total norm of order {norm_type} of the gradients of all stages is non-finite.")
        torch.nn.utils.clip_grads_with_norm_(tensors, max_norm, norm)
        return norm

    return clip_grad_norm_


def _clip_cut(original: Any, tensors: list[torch.Tensor], max_norm: float, norm_type: float, *options: Any) -> Any:
    """Clip gradients some of which are cut over ranks, and return the norm of the whole.

    torch returns one that is not summed up over the ranks yet, of which item() is what this rank has of it.
    """
    by_mesh = _by_mesh(tensors)
    if len(by_mesh) < 2:
        return _whole(original(tensors, max_norm, norm_type, *options))
    norms = [
        _whole(torch.nn.utils.get_total_norm([tensor.grad for tensor in group if tensor.grad is not None], norm_type))
        for group in by_mesh.values()
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if options[0] and not torch.isfinite(norm):
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is non-finite.")
    for mesh, group in by_mesh.items():
        alike = norm if mesh is None else DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, alike)
    return norm


def _whole(norm: Any) -> torch.Tensor:
    found: torch.Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return found


def _make_clip_grad_value(original: Any) -> Any:
    def clip_grad_value_(parameters: Any, clip_value: float, foreach: bool | None = None) -> None:
        strategy = _strategy()
        if strategy is None or not strategy.cuts_tensors:
            original(parameters, clip_value, foreach)
            return
        for group in _by_mesh([parameters] if isinstance(parameters, torch.Tensor) else parameters).values():
            original(group, clip_value, foreach)

    return clip_grad_value_


def _by_mesh(tensors: Iterable[torch.Tensor]) -> dict[Any, list[torch.Tensor]]:
    """Those that have a gradient, by the ranks over which that is cut; None: it is whole."""
    found: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.grad is not None:
            found.setdefault(getattr(tensor.grad, "device_mesh", None), []).append(tensor)
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def _make_number(original: Any) -> Any:
    def number(self: Any) -> Any:
        strategy = _strategy()
        if strategy is not None and any(placement.is_partial() for placement in self.placements):
            raise UsageError(
                f"--plan {strategy.plan.text}: this rank has a part of the number only, as of the norm of a gradient "
                "that is cut. Call full_tensor() on every rank first, and item() then; "
                "accelerator.clip_grad_norm_() returns the norm of all gradients."
            )
        return original(self)

    return number


# --- gradients of gradients ------------------------------------------------------------------------------------------


def _make_backward(original: Any) -> Any:
    def _engine_run_backward(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        strategy = _strategy()
        makes_graph = args[2] if len(args) > 2 else kwargs.get("create_graph", False)
        if makes_graph and strategy is not None and strategy.cuts_models:
            _refuse_exchanges(strategy, t_outputs)
        return original(t_outputs, *args, **kwargs)

    return _engine_run_backward


def _refuse_exchanges(strategy: Strategy, outputs: Any) -> None:
    if any(node.name() in _EXCHANGES for node in _nodes(outputs)):
        raise UsageError(
            f"--plan {strategy.plan.text}: gradients of gradients (create_graph=True, as for a gradient penalty) would "
            "leave out what the other ranks add. Say --plan ddp, or local-sgd."
        )


def _nodes(outputs: Any) -> Iterator[Any]:
    """All of the graph behind some tensors."""
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    waiting = [tensor.grad_fn for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
