"""A stage of a pipeline as the model that a loop calls: microbatches go forward in the call, gradients back later.

Every stage is called with the whole batch. What the last one computes, all get.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.group.shared_draws import drawing_apart

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_DIMENSIONS = 8


@dataclass
class Outputs:
    """What the last stage has made of a microbatch: a loss, or only a `result` of which the loop makes one."""

    result: torch.Tensor
    loss: torch.Tensor | None = None
    kind: str = ""  # under which the result is an attribute; "" when it is returned by itself


class Stage:
    """The part of a model that this rank has."""

    def inner(self, hidden: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """What the next stage gets; `hidden` is what came from the one before, None for the first."""
        raise NotImplementedError

    def last(
        self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], whole: dict[str, Any]
    ) -> Outputs:
        """What the last stage makes of a microbatch; `whole`: the keywords of the batch."""
        raise NotImplementedError


class PipelinedModel(nn.Module):
    """The model of a loop.

    Args:
        module: the plain model, in which the layers of other stages are left out.
        shapes: of the tensors of the whole model, by name.
        num_microbatches: of a batch, which may be fewer where it is small.
    """

    def __init__(
        self, module: nn.Module, stage: Stage, shapes: dict[str, tuple[int, ...]], num_microbatches: int
    ) -> None:
        super().__init__()
        self.module = module
        self.shapes = shapes
        self._stage = stage
        self._num_microbatches = num_microbatches

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @torch.compiler.disable  # which knows no group of processes, and would find one in it
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every rank calls it with the same batch; returns what the whole model would.

        Gradients go on to what was given to it, on every rank.
        """
        given = _Given()
        args, kwargs = given.taken_apart(args, kwargs)
        run = Passage(self._stage, _split(args, kwargs, self._num_microbatches), kwargs, given.leaves)
        with drawing_apart(dist.get_rank(), _device()) if self.training else contextlib.nullcontext():
            run.forward()
        grows = torch.is_grad_enabled()
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        loss, result, kind = run.shared_outputs(device, with_result=not grows)
        if loss is None:
            result = _Backward.apply(_leaf(device), result, run, *given.tensors) if grows else result
            return _named(None, result, kind)
        return _named(_Backward.apply(_leaf(device), loss, run, *given.tensors) if grows else loss, result, kind)


class _Given:
    """What a model is called with and gradients go back to: what another model has made, or a tensor that is trained.

    Attributes:
        tensors: as the loop has them.
        leaves: what the stages compute with in their place.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.leaves: list[torch.Tensor] = []

    def taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same, with leaves. Raises UsageError for what lies deeper than an argument."""
        if not torch.is_grad_enabled():
            return args, kwargs
        return tuple(map(self._leaf_of, args)), {name: self._leaf_of(value) for name, value in kwargs.items()}

    def _leaf_of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.requires_grad:
            self.tensors.append(value)
            self.leaves.append(value.detach().requires_grad_())
            return self.leaves[-1]
        if isinstance(value, list | tuple | dict) and any(_is_trained(part) for part in tree_leaves(value)):
            raise UsageError(
                f"--plan pipeline: model(...) was given a {type(value).__name__} with a tensor that gradients go back "
                "to. Give each such tensor as an argument of its own, or detach() it."
            )
        return value


def _is_trained(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _leaf(device: torch.device) -> torch.Tensor:
    return torch.zeros((), device=device, requires_grad=True)


def _named(loss: Any, result: Any, kind: str) -> Any:
    if not kind:
        return result
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(loss=loss, logits=result)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, value: torch.Tensor, run: Passage, *given: torch.Tensor) -> torch.Tensor:
        ctx.run = run
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        of_given = ctx.run.backward(gradient)
        return torch.zeros((), device=gradient.device), None, None, *of_given


class Passage:
    """One batch on its way through the stages.

    Args:
        parts: its microbatches, as arguments of the model.
        whole: the keywords of the batch.
        leaves: those of its tensors that gradients are wanted of.
    """

    def __init__(
        self,
        stage: Stage,
        parts: list[tuple[tuple[Any, ...], dict[str, Any]]],
        whole: dict[str, Any],
        leaves: list[torch.Tensor],
    ) -> None:
        self._leaves = leaves
        self._stage = stage
        self._parts = parts
        self._whole = whole
        self._rank, self._last_rank = dist.get_rank(), dist.get_world_size() - 1
        self._inputs: list[torch.Tensor | None] = []
        self._outputs: list[torch.Tensor] = []  # what is sent on, or the loss or result of the last stage
        self._made: list[Outputs] = []

    @property
    def _is_last(self) -> bool:
        return self._rank == self._last_rank

    def forward(self) -> None:
        """All microbatches, one after the other; a stage begins with the next one while others have this one."""
        for args, kwargs in self._parts:
            hidden = _receive(self._rank - 1) if self._rank > 0 else None
            if hidden is not None and torch.is_grad_enabled():
                hidden.requires_grad_()
            self._inputs.append(hidden)
            if self._is_last:
                assert hidden is not None
                made = self._stage.last(hidden, args, kwargs, self._whole)
                self._made.append(made)
                self._outputs.append(made.result if made.loss is None else made.loss)
            else:
                sent = self._stage.inner(hidden, args, kwargs)
                self._outputs.append(sent)
                _send(sent.detach(), self._rank + 1)

    def shared_outputs(self, device: torch.device, with_result: bool) -> tuple[Any, Any, str]:
        """The loss and the result of the batch as every rank has them; a result beside a loss only on request."""
        about: list[Any] = [None]
        if self._is_last:
            about = [(self._made[0].loss is not None, self._made[0].kind)]
        dist.broadcast_object_list(about, self._last_rank)
        has_loss, kind = about[0]
        loss = result = None
        if has_loss:
            losses = [made.loss.detach() for made in self._made if made.loss is not None]
            own = torch.stack(losses).sum() if self._is_last else None
            loss = _broadcast(own, self._last_rank, device)
        if with_result or not has_loss:
            own = torch.cat([made.result.detach() for made in self._made]) if self._is_last else None
            result = _broadcast(own, self._last_rank, device)
        return loss, result, kind

    def backward(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of all microbatches, the last one first; `gradient`: of the loss, or of the result.

        Returns those of the leaves, which any stage may have used.
        """
        if not self._outputs:
            raise UsageError(
                "--plan pipeline: backward was called twice for what one model(...) has given, which goes back through "
                "the stages once. Add the losses up and call backward for their sum, or call the model again."
            )
        is_loss = gradient.dim() == 0
        sizes = [output.shape[0] if output.dim() else 1 for output in self._outputs]
        shares = [gradient] * len(sizes) if is_loss or not self._is_last else list(gradient.split(sizes))
        for at in reversed(range(len(self._outputs))):
            output, hidden = self._outputs[at], self._inputs[at]
            wanted = shares[at] if self._is_last else _receive(self._rank + 1)
            if output.requires_grad:
                torch.autograd.backward(output, wanted.to(output.dtype))
            if hidden is not None:
                sent = hidden.grad if hidden.grad is not None else torch.zeros_like(hidden)
                _send(sent, self._rank - 1)
        self._outputs, self._inputs, self._made = [], [], []
        wanted_of = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        for found in wanted_of:
            dist.all_reduce(found)
        return wanted_of


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A batch as microbatches: what has as many rows as its first tensor is cut, all else goes to each."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        return [(args, kwargs)]
    rows = tensors[0].shape[0]
    number = max(1, min(number, rows))

    def cut(value: Any) -> list[Any]:
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows:
            return list(value.tensor_split(number))
        return [value] * number

    positional = [cut(value) for value in args]
    named = {name: cut(value) for name, value in kwargs.items()}
    return [
        (tuple(value[at] for value in positional), {name: value[at] for name, value in named.items()})
        for at in range(number)
    ]


# --- between ranks ---------------------------------------------------------------------------------------------------


def _header(tensor: torch.Tensor) -> torch.Tensor:
    numbers = [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    return torch.tensor(numbers + [0] * (2 + _MAX_DIMENSIONS - len(numbers)), device=tensor.device)


def _empty(header: torch.Tensor) -> torch.Tensor:
    dtype, dimensions, *shape = header.tolist()
    return torch.empty(shape[:dimensions], dtype=_DTYPES[dtype], device=header.device)


def _device() -> torch.device:
    is_nccl = "nccl" in dist.get_backend() and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _send(tensor: torch.Tensor, rank: int) -> None:
    tensor = tensor.contiguous()
    dist.send(_header(tensor), rank)
    dist.send(tensor, rank)


def _receive(rank: int) -> torch.Tensor:
    header = torch.zeros(2 + _MAX_DIMENSIONS, dtype=torch.int64, device=_device())
    dist.recv(header, rank)
    tensor = _empty(header)
    dist.recv(tensor, rank)
    return tensor


def _broadcast(tensor: torch.Tensor | None, source: int, device: torch.device) -> torch.Tensor:
    header = (
        _header(tensor) if tensor is not None else torch.zeros(2 + _MAX_DIMENSIONS, dtype=torch.int64, device=device)
    )
    dist.broadcast(header, source)
    tensor = tensor.contiguous() if tensor is not None else _empty(header)
    dist.broadcast(tensor, source)
    return tensor
