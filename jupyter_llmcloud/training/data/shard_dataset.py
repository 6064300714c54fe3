"""Prepared data as a data set of torch: rows by number, from row groups that are read ahead and kept for a while."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from jupyter_llmcloud.storage.datasets.manifest import Manifest
from jupyter_llmcloud.storage.datasets.pixels import as_rgb
from jupyter_llmcloud.storage.datasets.shards import ShardReader

_READERS = 2  # threads


class GroupCache:
    """Row groups, decoded: the latest, and those that are on their way. Threads read them, one caller uses them.

    Args:
        limit: how many are kept; None: all.
    """

    def __init__(self, reader: ShardReader, columns: list[str] | None, limit: int | None) -> None:
        self._reader = reader
        self._columns = columns
        self._limit = limit
        self._groups: OrderedDict[int, Future[dict[str, Any]]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()

    def _begin_here(self) -> None:
        """In a worker process that was forked: the threads have stayed behind, and the lock may be held for ever."""
        self._process, self._pool, self._lock = os.getpid(), None, threading.Lock()
        self._groups = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:  # to worker processes and into copies: what was read stays here
        return GroupCache, (self._reader, self._columns, self._limit)

    def expect(self, group: int) -> Future[dict[str, Any]]:
        """Have a group read."""
        if self._process != os.getpid():
            self._begin_here()
        with self._lock:
            if (known := self._groups.get(group)) is not None:
                self._groups.move_to_end(group)
                return known
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="llmcloud-shards")
            asked = self._groups[group] = self._pool.submit(self._read, group)
            while self._limit is not None and len(self._groups) > self._limit:
                self._groups.popitem(last=False)
            return asked

    def get(self, group: int) -> dict[str, Any]:
        """The columns of a group. Raises UsageError when its shard cannot be read."""
        return self.expect(group).result()

    def _read(self, group: int) -> dict[str, Any]:
        table = self._reader.read(group, self._columns)
        return {name: _decoded(table.column(name)) for name in table.column_names}

    def close(self) -> None:
        """Let go of what was read, and end the threads."""
        with self._lock:
            self._groups.clear()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _decoded(column: Any) -> Any:
    """A column as an array of NumPy, (rows,) or (rows, length); as a list where it is neither numbers nor tokens."""
    import pyarrow as pa

    column = column.combine_chunks()
    kind = column.type
    is_fixed = pa.types.is_fixed_size_list(kind) and pa.types.is_primitive(kind.value_type)
    if is_fixed and not column.null_count and not column.flatten().null_count:
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), kind.list_size)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if is_number and not column.null_count:
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


class TokenRows(Sequence[dict[str, Any]]):
    """Rows of tokens that become one batch without becoming tensors one by one.

    Args:
        rows: (token ids, how many of them are no filling).
    """

    def __init__(self, rows: Sequence[tuple[Any, int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> TokenRows: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | TokenRows:
        if isinstance(index, slice):
            return TokenRows(self._rows[index])
        return {name: values[0] for name, values in TokenRows([self._rows[index]]).batch().items()}

    def batch(self) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 (rows, seq_len)."""
        ids = torch.from_numpy(np.stack([ids for ids, _ in self._rows]).astype(np.int64))
        lengths = torch.tensor([int(length) for _, length in self._rows])
        filling = torch.arange(ids.shape[1]) >= lengths[:, None]
        labels = ids.masked_fill(filling, -100)
        return {"input_ids": ids, "attention_mask": (~filling).long(), "labels": labels}


class ShardDataset(Dataset[dict[str, Any]]):
    """The rows of prepared data, map-style.

    Tokens: `input_ids` and `labels` int64 (seq_len,), -100 where a label is filling, `attention_mask` int64 (seq_len,).
    Images with a size: `pixel_values` float32 (3, size, size) from 0 to 1 and `labels`; other columns as they are.

    Attributes:
        manifest: of the data.
    """

    def __init__(
        self, manifest: Manifest, reader: ShardReader, columns: Sequence[str] | None = None, limit: int | None = None
    ) -> None:
        self.manifest = manifest
        self.groups = reader.groups
        self._starts = np.array([0, *accumulate(reader.groups)])
        is_chosen = columns is not None and manifest.kind == "rows"  # tokens and images need both of theirs
        chosen = list(columns or ()) if is_chosen else None
        self._cache = GroupCache(reader, chosen, limit)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Several rows at once, as loaders of torch ask."""
        numbers = np.asarray(rows, dtype=np.int64)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"row {int(numbers.max())} of {len(self)}")
        groups = np.searchsorted(self._starts, numbers, side="right") - 1
        places = numbers - self._starts[groups]
        found = [(self._cache.get(group), at) for group, at in zip(groups.tolist(), places.tolist(), strict=True)]
        if self.manifest.kind == "tokens":
            return TokenRows([(columns["input_ids"][at], columns["length"][at]) for columns, at in found])
        return [self._row({name: values[at] for name, values in columns.items()}) for columns, at in found]

    def expect(self, rows: Sequence[int]) -> None:
        """These rows are asked for soon."""
        groups = np.searchsorted(self._starts, np.asarray(rows), side="right") - 1
        for group in dict.fromkeys(groups.tolist()):
            self._cache.expect(group)

    def close(self) -> None:
        """Let go of what was read."""
        self._cache.close()

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.manifest.kind == "images":
            return _picture(row, self.manifest.recipe.get("image_size"))
        return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def _picture(row: dict[str, Any], size: int | None) -> dict[str, Any]:
    if size is None:
        from PIL import Image

        return {"image": as_rgb(Image.open(io.BytesIO(row["image"]))), "labels": int(row["label"])}
    pixels = np.frombuffer(row["image"], np.uint8).reshape(size, size, 3)
    values = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()
    return {"pixel_values": values, "labels": int(row["label"])}
