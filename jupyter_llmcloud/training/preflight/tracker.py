"""What a training step would hold, by tensors that have sizes and no memory.

Tensors of floating point numbers are fake: of each operation only the shapes are worked out. Whole numbers are real,
so that samplers, shuffles and token ids work as they do. A value that a program reads from a fake tensor is guessed: 1.
"""

from __future__ import annotations

import math
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from jupyter_llmcloud.core.preflight.timeline import Event

aten = torch.ops.aten
_FACTORIES = {
    *(aten.empty, aten.zeros, aten.ones, aten.full, aten.rand, aten.randn, aten.normal),
    *(aten.empty_strided, aten.linspace, aten.eye),
}


class NoMemoryLeft(BaseException):
    """What is really allocated came near the end of this machine's memory."""


class TookTooLong(BaseException):
    """What was to be worked out takes longer than it is worth; no `except Exception` of a model holds this up."""


class AllocationTracker(TorchDispatchMode):
    """Notes the bytes of every storage while it lives.

    Args:
        is_fake: give floating point tensors no memory.
        most: bytes of real tensors after which NoMemoryLeft is raised.

    Attributes:
        events: of allocations, in order.
        flops: of the operations so far.
        fake: the mode of tensors without memory; None where all are real.
        ends_at: when TookTooLong is raised, in seconds of the monotonic clock.
    """

    def __init__(self, is_fake: bool, most: int) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.flops = 0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else None
        self.ends_at = math.inf
        self._most, self._live = most, 0
        self._guess = _Guess()
        self._numbers: dict[int, tuple[int, Any]] = {}  # id of a storage -> its number, what watches it
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, fake where it can be, and note what it allocates."""
        if time.monotonic() > self.ends_at:
            raise TookTooLong
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        has_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if has_fake and func is aten._local_scalar_dense.default:
            return torch.full((), self._guess.next(), dtype=tensors[0].dtype).item()
        if has_fake and func is aten.is_nonzero.default:
            return self._guess.next()
        if self.fake is not None and (has_fake or self._makes_numbers(func, tensors, args, kwargs)):
            with self.fake:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if has_fake and func is aten.mkldnn_rnn_layer.default:
            result = _with_workspace(result)
        self._count(func, args, kwargs, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.number(leaf)
        return result

    @staticmethod
    def _makes_numbers(func: Any, tensors: list[Any], args: Any, kwargs: Any) -> bool:
        if tensors or func.overloadpacket not in _FACTORIES:
            return False
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return bool(dtype.is_floating_point) and bool(args) and args[0] != [] and args[0] != ()

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))

    def number(self, tensor: torch.Tensor) -> int:
        """Of the storage of a tensor, which is counted from now on."""
        if tensor.layout is not torch.strided:
            return -1
        storage = tensor.untyped_storage()
        known = self._numbers.get(storage._cdata)
        if known is not None:
            return known[0]
        size, number, key = storage.nbytes(), self._next, storage._cdata
        self._next += 1
        self.events.append((number, size))
        is_real = not isinstance(tensor, FakeTensor)

        def gone(_: Any) -> None:
            self.events.append((number, -size))
            self._numbers.pop(key, None)
            self._live -= size if is_real else 0

        self._numbers[key] = (number, weakref.ref(storage, gone))
        self._live += size if is_real else 0
        if self._live > self._most:
            raise NoMemoryLeft
        return number


class _Guess:
    """What is said of a number that nobody has computed: that it is true, 1.

    A loop that ends when it is not would go on for ever, as the one does in which `trunc_normal_` draws again what lies
    outside: who asks on and on at one place is told the contrary after a while, and then the first again.
    """

    MOST = 8

    def __init__(self) -> None:
        self._asked: Counter[int] = Counter()  # by place

    def next(self) -> bool:
        """For who asks now."""
        place = hash(tuple((frame.f_code, line) for frame, line in traceback.walk_stack(None)))
        self._asked[place] += 1
        return (self._asked[place] - 1) // self.MOST % 2 == 0


def _with_workspace(result: Any) -> Any:
    """What an LSTM on the CPU keeps for its backward pass, which torch leaves empty in fake tensors.

    For each number of its output it writes down four gates and two states.
    """
    output, *states, _ = result
    return (output, *states, output.new_empty(6 * output.numel() * output.element_size(), dtype=torch.uint8))


class Alone(torch.nn.Module):
    """In place of a DDP model on a rank without others: the model itself."""

    def __init__(self, module: torch.nn.Module, *_: Any, **__: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing is exchanged anyhow."""
        yield


@contextmanager
def all_in_one(tracker: AllocationTracker) -> Iterator[None]:
    """Within the block a DDP model is the model itself: the other ranks are not there."""
    from torch.nn import parallel

    original = parallel.DistributedDataParallel

    parallel.DistributedDataParallel = Alone  # type: ignore[misc, assignment]
    try:
        with tracker:
            yield
    finally:
        parallel.DistributedDataParallel = original  # type: ignore[misc]


def keep_modules_in_place() -> None:
    """Have a module that is moved keep its parameters: those that are fake cannot be swapped."""

    def applied(self: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
        for child in self.children() if recurse else ():
            child._apply(change)
        for name, parameter in self._parameters.items():
            if parameter is not None and (changed := change(parameter.detach())).dtype != parameter.dtype:
                self._parameters[name] = torch.nn.Parameter(changed, parameter.requires_grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = change(buffer)
        return self

    torch.nn.Module._apply = applied  # type: ignore[method-assign]
