"""Values in memory of their own: random number generators, buffers, files, numbers of numpy and torch."""

from __future__ import annotations

import gc
import sys
import zoneinfo
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.training.object_graph.kinds.base import CannotSave, Child, Kind, set_attributes, visible


class Buffer(Kind):
    """io.StringIO and io.BytesIO."""

    name = "io buffer"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.getvalue(), value.tell()], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.seek(0)
        value.truncate()
        value.write(head[0])
        value.seek(head[1])


class Scalar(Kind):
    """One number of numpy."""

    name = "numpy scalar"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.dtype.str, value.tobytes()], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        dtype = np.dtype(head[0])
        return np.frombuffer(head[1], dtype)[0] if dtype.itemsize else dtype.type()


class Numbers(Kind):
    """A generator of random numbers."""

    name = "random.Random"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        version, numbers, gauss = value.getstate()
        own = [] if not hasattr(value, "__dict__") else visible(value)
        head = [version, list(numbers), gauss, [name for name, _ in own]]
        return head, [(f".{name}", item) for name, item in own]

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.setstate((head[0], tuple(head[1]), head[2]))
        if head[3]:
            set_attributes(value, head[3], children)


class TorchNumbers(Kind):
    """torch.Generator."""

    name = "torch.Generator"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [str(value.device), value.get_state().numpy().tobytes()], []

    def make(self, cls: Any, head: Any) -> Any:
        return torch.Generator(head[0])

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value.set_state(torch.frombuffer(bytearray(head[1]), dtype=torch.uint8))


class NumpyNumbers(Kind):
    """numpy's bit generators, whose state two generators may share, and RandomState."""

    name = "numpy numbers"
    kept = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if hasattr(value, "get_state"):
            return [], [("<state>", value.get_state(legacy=False))]
        # By the seed sequence `spawn()` makes others, each once.
        return [], [("<state>", value.state), ("<seed sequence>", getattr(value, "seed_seq", None))]

    def make(self, cls: Any, head: Any) -> Any:
        return cls(0)

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if hasattr(value, "set_state"):
            value.set_state(children[0])
        elif len(children) > 1 and children[1] is not None:
            value.__setstate__((children[0], children[1]))
        else:
            value.state = children[0]


class OverBits(Kind):
    """np.random.Generator, over its bit generator."""

    name = "numpy generator"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("<bits>", value.bit_generator)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return cls(children[0])


class Bytes(Kind):
    """bytearray."""

    name = "bytearray"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [bytes(value)], []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        value[:] = head[0]


class View(Kind):
    """memoryview of a whole object."""

    name = "memoryview"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if value.obj is None or value.nbytes != memoryview(value.obj).nbytes or not value.contiguous:
            raise CannotSave("a memoryview of a part of something")
        return [value.format], [("<object>", value.obj)]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        found = memoryview(children[0])
        return found if found.format == head[0] else found.cast(head[0])


class DictView(Kind):
    """What `keys()`, `values()` and `items()` of a dict give: it goes on showing the dict, which is found below it."""

    name = "dict view"
    filled = False
    types: tuple[type, ...] = tuple(
        type(view)
        for made in (dict[str, int](), OrderedDict[str, int]())
        for view in (made.keys(), made.values(), made.items())
    )

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [type(value).__name__.rpartition("_")[2]], [("<dict>", gc.get_referents(value)[0])]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        if head[0] not in ("keys", "values", "items"):
            raise CannotSave(f"{head[0]} is no view of a dict")
        return getattr(children[0], head[0])()


class MappingView(Kind):
    """types.MappingProxyType, which shows a dict that it does not let change; in a signature, say."""

    name = "mapping proxy"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [], [("<dict>", gc.get_referents(value)[0])]

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return cls(children[0])


class Numbered(Kind):
    """array.array."""

    name = "array.array"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [value.typecode, value.tobytes()], []

    def make(self, cls: Any, head: Any) -> Any:
        return cls(head[0])

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        del value[:]
        value.frombytes(head[1])


class OpenFile(Kind):
    """An open file: where it is read; one that is written to must not have been, unless it is appended to."""

    name = "file"
    made = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if value.closed:
            return ["closed", 0], []
        mode = str(getattr(value, "mode", ""))
        if not value.seekable() or mode.startswith("a") or "a" in mode:
            return ["stream", 0], []
        if value.writable():
            return ["written", value.tell()], []
        return ["read", _position(value)], []

    def refusal(self, head: Any) -> str:
        return "a file that was written to (one that is opened to append is no trouble)" if head[0] == "written" else ""

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if head[0] == "read":
            value.seek(head[1])
        elif head[0] == "closed":
            value.close()


def _position(value: Any) -> int:
    try:
        return int(value.tell())
    except OSError:  # lines of it are being read
        raise CannotSave("a file that is being read line by line, which does not tell how far it is") from None


class Torch(Kind):
    """dtype, device, Size and their like, which are equal when they read alike."""

    name = "torch value"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if isinstance(value, torch.Size):
            return ["Size", list(value)], []
        if isinstance(value, torch.finfo | torch.iinfo):
            return [type(value).__name__, f"torch.{value.dtype}"], []
        return [type(value).__name__, str(value)], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        kind, text = head
        if kind == "Size":
            return torch.Size(text)
        if kind == "device":
            return torch.device(text)
        found = getattr(torch, text.removeprefix("torch."))
        return getattr(torch, kind)(found) if kind in ("finfo", "iinfo") else found


class Singleton(Kind):
    """`...` and `NotImplemented`."""

    name = "singleton"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [repr(value)], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return cls()


class Missing(Kind):
    """`NaT` and `NA` of pandas: there is one of each, which others ask for by `is`."""

    name = "missing value"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return [type(value).__name__.removesuffix("Type")], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return getattr(sys.modules["pandas"], {"NaT": "NaT", "NA": "NA"}[head[0]])


def is_missing(value: Any) -> bool:
    """Whether it is one of them, of an object of pandas."""
    return type(value).__name__ in ("NaTType", "NAType")


class Zone(Kind):
    """A time zone that has a name; of one name there is one."""

    name = "zone"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        if value.key is None or zoneinfo.ZoneInfo(value.key) is not value:  # read from a file of somebody's
            raise CannotSave("a zoneinfo.ZoneInfo without a name")
        return [value.key], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return zoneinfo.ZoneInfo(head[0])
