"""The memory of tensors and arrays: one region that several of them may look into."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import torch


class Region:
    """A piece of memory as flat bytes; `owner` keeps it alive."""

    __slots__ = ("__weakref__", "bytes", "device", "owner", "start")

    def __init__(self, owner: Any, data: np.ndarray | torch.Tensor, start: int, device: str) -> None:
        self.owner = owner
        self.bytes = data
        self.start = start
        self.device = device

    def __len__(self) -> int:
        return len(self.bytes)

    def as_tensor(self) -> torch.Tensor:
        """The same memory as a tensor of bytes."""
        if isinstance(self.bytes, torch.Tensor):
            return self.bytes
        if isinstance(self.owner, torch.Tensor):
            return _flat(self.owner)
        return torch.from_numpy(self.bytes)  # of an array, which is its owner

    def as_array(self) -> np.ndarray:
        """The same memory as an array of bytes that keeps it alive; only on a CPU."""
        assert isinstance(self.bytes, np.ndarray)
        return _flat(self.owner).numpy() if isinstance(self.owner, torch.Tensor) else self.bytes

    @property
    def is_writable(self) -> bool:
        """Whether it may be written to."""
        return isinstance(self.bytes, torch.Tensor) or bool(self.bytes.flags.writeable)

    def fill(self, data: torch.Tensor) -> None:
        """Write these bytes into it."""
        with torch.no_grad():
            self.as_tensor().copy_(data)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage())


def of_tensor(tensor: torch.Tensor) -> Region:
    """The storage of a tensor."""
    flat = _flat(tensor)
    start = flat.data_ptr()
    data = _at(start, len(flat)) if tensor.device.type == "cpu" else flat
    return Region(tensor.detach(), data, start, str(tensor.device))


def start_of(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins; 0 when it has none of its own here."""
    local = getattr(tensor, "to_local", None)
    plain = local() if local is not None else tensor
    has_storage = plain.layout is torch.strided and not plain.is_meta
    return plain.untyped_storage().data_ptr() if has_storage else 0


def _at(start: int, num_bytes: int) -> np.ndarray:
    """The bytes at an address. `Tensor.numpy()` would forbid the storage to be resized, which FSDP does."""
    if not num_bytes:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(start))


def of_array(array: np.ndarray) -> Region | None:
    """The memory of the array that this one looks into; None when that is not in one piece."""
    root: Any = array
    while (base := getattr(root, "base", None)) is not None:
        if not isinstance(base, np.ndarray) and type(base).__name__ != "DummyArray":
            break
        root = base
    if isinstance(root.base, torch.Tensor):
        return of_tensor(root.base)
    if not isinstance(root, np.ndarray):
        return None
    plain = root.view(np.ndarray)
    flat = plain.ravel(order="K")
    if flat.size and not np.shares_memory(flat, plain):
        return None
    return Region(root, flat.view(np.uint8), int(flat.__array_interface__["data"][0]), "cpu")


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array looks into a file that is mapped to be read: it may be larger than memory, and never changes."""
    root: Any = array
    while isinstance(root, np.ndarray):
        root = root.base
    return isinstance(root, mmap.mmap) and not array.flags.writeable


def allocate(num_bytes: int, device: str) -> Region:
    """New memory."""
    return of_tensor(torch.empty(num_bytes, dtype=torch.uint8, device=device))


def offset_of(array: np.ndarray, region: Region) -> int:
    """Where in the region the first element of an array is."""
    return int(array.__array_interface__["data"][0]) - region.start


def view_as_tensor(region: Region, dtype: torch.dtype, offset: int, size: Any, stride: Any) -> torch.Tensor:
    """A tensor that looks into a region; `offset` in elements."""
    storage = region.as_tensor().untyped_storage()
    shift = (region.start - storage.data_ptr()) // dtype.itemsize
    empty = torch.empty(0, dtype=dtype, device=region.device)
    return empty.set_(storage, offset + shift, tuple(size), tuple(stride))


def view_as_array(region: Region, dtype: np.dtype, offset: int, shape: Any, strides: Any) -> np.ndarray:
    """An array that looks into a region; `offset` in bytes."""
    return np.ndarray(tuple(shape), dtype, buffer=region.as_array().data, offset=offset, strides=tuple(strides))
