"""Kinds of tensors and arrays: each a view of a region of memory, which others may share."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.training.object_graph import memory
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, CannotSave, Child, Kind, Untouched
from jupyter_llmcloud.training.object_graph.memory import Region
from jupyter_llmcloud.training.resume.user_code import is_own_module


class _LostGraph(torch.autograd.Function):
    """Stands for the operations that a value came from: there is no way back through them."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "this tensor was restored from a checkpoint, which holds its value but not the operations that it came "
            "from: detach() what is kept from one step of the training to the next."
        )


def without_graph(value: torch.Tensor) -> torch.Tensor:
    """The same value; going back from it raises an error that says why."""
    return _LostGraph.apply(value, torch.zeros((), requires_grad=True))


class Memory(Kind):
    """A region: its bytes are compared and saved by whoever asks for them."""

    name = "memory"

    def split(self, value: Region) -> tuple[Any, list[Child]]:
        return [len(value), value.device], []

    def make(self, cls: Any, head: Any) -> Any:
        return memory.allocate(head[0], head[1])


_OF_TENSOR = 10  # parts of the head of one that has memory
_BY_LIBRARIES = ("_is_hf", "_dynamo", "_fsdp", "_ddp", "__")  # how these begin what they attach to tensors
_ATTACHED = (list, tuple, dict, set, frozenset, deque, np.ndarray)


def attached_to(value: torch.Tensor) -> list[Child]:
    """The attributes that a cell has given to a tensor."""
    return [(name, item) for name, item in vars(value).items() if is_attached(name, item)]


def is_attached(name: str, item: Any) -> bool:
    """Whether an attribute of an object of a library is one that a cell has given to it."""
    if type(item) in SIMPLE:
        return not name.startswith(_BY_LIBRARIES)
    if name.startswith("_"):  # of a library, as a rule: what a flat parameter was made of
        return False
    return type(item) is torch.Tensor or isinstance(item, _ATTACHED) or is_own_module(str(type(item).__module__))


class TorchTensor(Kind):
    """A tensor of torch, or a parameter."""

    name = "tensor"
    filled = False  # it is looked for by the memory that it is a view of

    def split(self, value: torch.Tensor) -> tuple[Any, list[Child]]:
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            return self._other(value)
        if value.numel() and not value.untyped_storage().size():
            return ["freed"], []  # FSDP has let it go until it is gathered again
        attached = attached_to(value)
        head = [
            str(value.dtype), list(value.size()), list(value.stride()), value.storage_offset(), value.requires_grad,
            isinstance(value, torch.nn.Parameter), [name for name, _ in attached],
            not value.is_leaf, value.is_conj(), value.is_neg(),
        ]  # fmt: skip
        return head, [("<memory>", memory.of_tensor(value)), *((f".{name}", item) for name, item in attached)]

    def own(self, head: Any, items: list[Any]) -> tuple[Any, list[Any]]:
        return ([*head[:6], *head[7:]], items[:1]) if len(head) == _OF_TENSOR else (head, items)

    def attach(self, value: Any, head: Any, children: list[Any]) -> None:
        if len(head) == _OF_TENSOR and (names := head[6]):
            vars(value).update(zip(names, children[1:], strict=True))

    def _other(self, value: torch.Tensor) -> tuple[Any, list[Child]]:
        if value.layout is torch.sparse_coo:
            head = ["sparse", list(value.shape), value.requires_grad, value.is_coalesced()]
            return head, [("<indices>", value._indices()), ("<values>", value._values().detach())]
        if value.layout is torch.sparse_csr:
            parts = value.crow_indices(), value.col_indices(), value.values().detach()
            return ["csr", list(value.shape), value.requires_grad], [(f"<{n}>", part) for n, part in enumerate(parts)]
        if value.is_meta:
            return ["meta", str(value.dtype), list(value.shape)], []
        raise CannotSave(f"a tensor of layout {value.layout}, quantized: {value.is_quantized}")

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        if head[0] == "meta":
            return torch.empty(head[2], dtype=getattr(torch, head[1].removeprefix("torch.")), device="meta")
        if head[0] == "freed":
            raise CannotSave("its memory was let go")
        if head[0] in ("sparse", "csr"):
            return _sparse(head, children)
        plain, _ = self.own(head, children)
        name, size, stride, offset, requires_grad, is_parameter, has_graph, is_conj, is_neg = plain
        dtype = getattr(torch, name.removeprefix("torch."))
        made = memory.view_as_tensor(children[0], dtype, offset, size, stride)
        if is_conj or is_neg:
            made = torch._conj(made) if is_conj else torch._neg_view(made)
        if is_parameter:
            made = torch.nn.Parameter(made, requires_grad)
        elif has_graph:
            made = without_graph(made) if requires_grad else made
        elif requires_grad:
            made.requires_grad_()
        self.attach(made, head, children)
        return made


class TrainedTensor(Untouched):
    """A tensor that an optimizer trains, whose values are saved with its model: what the cell has attached to it."""

    name = "trained tensor"
    led = True

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        own = attached_to(value)
        return [name for name, _ in own], [(f".{name}", item) for name, item in own]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        vars(value).update(zip(head, children, strict=True))


def _sparse(head: Any, children: list[Any]) -> torch.Tensor:
    if head[0] == "csr":
        rows, columns, values = children
        return torch.sparse_csr_tensor(rows, columns, values, size=head[1]).requires_grad_(head[2])
    indices, values = children
    made = torch.sparse_coo_tensor(indices, values, size=head[1], is_coalesced=head[3], check_invariants=False)
    return made.requires_grad_(head[2])


class ShardedTensor(Kind):
    """A tensor of which each rank holds a part (a DTensor): what an optimizer trains is saved with it, others are not.

    One that another cell has left, and this one does not write to, is no trouble.
    """

    name = "sharded tensor"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        head = [str(value.dtype), list(value.shape), [str(placement) for placement in value.placements]]
        return head, [("<memory>", self.unsaved_memory(value))]

    def unsaved_memory(self, value: Any) -> Region:
        with torch.no_grad():
            part = value.to_local()
        if part.is_meta or part.layout != torch.strided:
            raise CannotSave(self.refusal(None))
        return memory.of_tensor(part)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        pass  # it is as it was

    def refusal(self, head: Any) -> str:
        return "a sharded tensor that no optimizer trains"


class Array(Kind):
    """A numpy array of numbers, texts of fixed length, times, or records of such."""

    name = "array"
    filled = False

    def split(self, value: np.ndarray) -> tuple[Any, list[Child]]:
        if memory.is_mapped(value):
            value = np.array(value)  # what it shows, not the whole file
        region = memory.of_array(value)
        if region is None:
            raise CannotSave("an array over memory that is not in one piece")
        descr = np.lib.format.dtype_to_descr(value.dtype)
        head = [descr, list(value.shape), list(value.strides), memory.offset_of(value, region) if value.size else 0]
        return head, [("<memory>", region)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        descr, shape, strides, offset = head
        dtype = np.lib.format.descr_to_dtype(descr)
        if 0 in shape:
            return np.empty(shape, dtype)
        made = memory.view_as_array(children[0], dtype, offset, shape, strides)
        return made if cls is np.memmap or cls is np.ndarray else made.view(cls)


class ArrayOfClass(Array):
    """An array of a class of its own, a masked one for instance: with its attributes."""

    name = "array of a class"

    def split(self, value: np.ndarray) -> tuple[Any, list[Child]]:
        head, children = super().split(value)
        own = list(vars(value).items()) if hasattr(value, "__dict__") else []
        return [head, [name for name, _ in own]], [*children, *((f".{name}", item) for name, item in own)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        plain, names = head
        made = super().build(np.ndarray, plain, children[:1]).view(cls)
        if names:
            vars(made).update(zip(names, children[1:], strict=True))
        return made


class Objects(Kind):
    """A numpy array of objects."""

    name = "array of objects"

    def split(self, value: np.ndarray) -> tuple[Any, list[Child]]:
        if value.dtype != object:
            raise CannotSave(f"an array of {value.dtype}")
        return list(value.shape), [(f"[{at}]", item) for at, item in enumerate(value.ravel().tolist())]

    def make(self, cls: Any, head: Any) -> Any:
        return np.empty(head, object)

    def fill(self, value: np.ndarray, head: Any, children: list[Any]) -> None:
        flat = np.empty(len(children), object)
        for at, item in enumerate(children):
            flat[at] = item
        value[...] = flat.reshape(head)

    def fits(self, value: np.ndarray, head: Any) -> bool:
        """Whether an array that is there has the shape."""
        return value.dtype == object and list(value.shape) == head
