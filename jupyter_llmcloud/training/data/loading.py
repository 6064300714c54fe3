"""`lc.data.load`: a loader of this rank's part of prepared data, or of a data set that is there already."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from typing import Any, SupportsIndex

import torch
from torch.utils.data import IterableDataset, default_collate

from jupyter_llmcloud.core.data.order import RowOrder, WindowOrder, mix, shuffled
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets import filesystem, manifest
from jupyter_llmcloud.storage.datasets.shards import ShardReader
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer
from jupyter_llmcloud.training.data.rank_batches import Group, RankBatches
from jupyter_llmcloud.training.data.rank_loader import RankLoader
from jupyter_llmcloud.training.data.shard_dataset import ShardDataset, TokenRows
from jupyter_llmcloud.training.data.streams import StreamShare

DEFAULT_BATCH = 8
Collate = Callable[[Sequence[Any]], Any]


def load(
    source: Any,
    batch_size: int | None = None,
    *,
    global_batch_size: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    streaming: bool = False,
    window: int = 8,
    last: str = "share",
    columns: Sequence[str] | None = None,
    transform: Collate | None = None,
    collate_fn: Collate | None = None,
    tokenizer: Any = None,
    prefetch: int = 2,
    num_workers: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> RankLoader:
    """See `lc.data.load`, which explains the arguments."""
    _check(batch_size, global_batch_size, window, prefetch, seed, rank, world_size)
    seed = index(seed)
    group = Group(rank, world_size, batch_size or DEFAULT_BATCH, global_batch_size)
    chosen = transform or collate_fn
    collate = partial(_given_a_list, chosen) if chosen is not None else collated
    if isinstance(source, str):
        dataset = _prepared(source, columns, tokenizer, (window * 2 + 1) if streaming else None, storage_options)
        groups = dataset.groups
        if shuffle is False:
            orders: Callable[[int], RowOrder] = lambda epoch: range(len(dataset))  # noqa: E731
        elif streaming:
            orders = lambda epoch: WindowOrder(groups, window, seed, epoch)  # noqa: E731
        else:
            orders = lambda epoch: shuffled(len(dataset), seed, epoch)  # noqa: E731
        expect = dataset.expect if not num_workers else None  # worker processes read by themselves
        batches = RankBatches(len(dataset), group, orders, last, expect, prefetch)
        order = "as it is" if shuffle is False else f"windows of {window}" if streaming else "shuffled"
        identity = f"{dataset.manifest.fingerprint}, {len(dataset):,} rows {order}, seed {seed}"
        return RankLoader(dataset, identity, batch_sampler=batches, collate_fn=collate, num_workers=num_workers)
    for name, value in (("columns", columns), ("tokenizer", tokenizer), ("streaming", streaming or None)):
        if value is not None:
            raise UsageError(f"{name}= is for prepared data, not for {type(source).__name__}.")
    if _is_stream(source):
        stream, seeded = _share_of_stream(source, group, last, shuffle, seed)
        return RankLoader(stream, f"a stream, seed {seeded}", batch_size=None, collate_fn=collate, num_workers=0)
    _check_rows(source)
    num_rows = len(source)
    own = (lambda epoch: range(num_rows)) if shuffle is False else (lambda epoch: shuffled(num_rows, seed, epoch))
    identity = f"{getattr(source, '_fingerprint', type(source).__name__)}, {num_rows:,} rows, " + (
        "as they are" if shuffle is False else f"shuffled, seed {seed}"
    )
    batches = RankBatches(num_rows, group, own, last)
    return RankLoader(source, identity, batch_sampler=batches, collate_fn=collate, num_workers=num_workers)


def _check_rows(source: Any) -> None:
    """Raise UsageError for what has no numbered rows."""
    if isinstance(source, Mapping):
        raise UsageError(
            f"{type(source).__name__} is no data set, but holds some by name ({', '.join(map(repr, [*source][:5]))}): "
            "give one."
        )
    if any(hasattr(source, name) for name in ("iterrows", "to_pylist", "to_dicts")):  # pandas, Arrow, polars
        raise UsageError(
            f"{type(source).__name__} is a table: give its rows (to_dict('records') of pandas, to_pylist() of Arrow), "
            "or prepare it as a Parquet file."
        )
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise UsageError(
            f"{type(source).__name__} is no data set: give the folder of prepared data, or a data set of Hugging Face "
            "or of torch (with __getitem__ and __len__, or an IterableDataset)."
        )


def _share_of_stream(
    source: Any, group: Group, last: str, shuffle: bool | None, seed: int
) -> tuple[StreamShare, int | None]:
    """What a rank takes of a stream, and the seed by which that is shuffled. Raises UsageError."""
    if getattr(source, "_distributed", None) is not None:
        raise UsageError(
            "the stream is split by split_dataset_by_node: of its part each rank would take its share, and most "
            "rows would come on no rank. Give the whole stream; each rank passes over it and takes its own rows."
        )
    can_shuffle = _is_shuffled_by_seed(source)
    if shuffle and not can_shuffle:
        raise UsageError(f"{type(source).__name__} is a stream that cannot be shuffled: shuffle=False.")
    by = mix(seed) & 0x7FFFFFFF if can_shuffle and shuffle is not False else None
    return StreamShare(source, group, last, by, buffer=1000), by


def _is_shuffled_by_seed(source: Any) -> bool:
    """As streams of Hugging Face are; others have a `shuffle` that means something else."""
    try:
        return {"seed", "buffer_size"} <= {*inspect.signature(source.shuffle).parameters}
    except (AttributeError, TypeError, ValueError):
        return False


def _check(
    batch_size: int | None,
    global_batch_size: int | None,
    window: int,
    prefetch: int,
    seed: Any,
    rank: int | None,
    world_size: int | None,
) -> None:
    if batch_size is not None and global_batch_size is not None:
        raise UsageError("batch_size and global_batch_size say the same thing twice: give one.")
    named = {"batch_size": batch_size, "global_batch_size": global_batch_size, "window": window}
    for name, value in named.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name}={value!r}: expected a whole number of at least 1.")
    if not isinstance(seed, SupportsIndex):
        raise UsageError(f"seed={seed!r}: expected a whole number.")
    if prefetch < 0:
        raise UsageError(f"prefetch={prefetch!r}: expected 0 or more batches.")
    if (rank is None) != (world_size is None) or (rank is not None and not 0 <= rank < (world_size or 0)):
        raise UsageError(f"rank={rank!r}, world_size={world_size!r}: give both, the rank below the size.")


def _prepared(
    url: str, columns: Sequence[str] | None, tokenizer: Any, limit: int | None, storage: Mapping[str, Any] | None
) -> ShardDataset:
    filesystem.require("pyarrow", what="loading prepared data")
    found = manifest.read(url, storage)
    if tokenizer is not None:
        found.check_tokenizer(pack_tokenizer(tokenizer)[0].fingerprint, url)
    if columns is not None and (unknown := [name for name in columns if name not in found.columns]):
        raise UsageError(f"columns={unknown[0]!r}: {url!r} has {', '.join(found.columns)}.")
    reader = ShardReader(url, found, storage)
    reader.check()
    return ShardDataset(found, reader, columns, limit)


def _is_stream(source: Any) -> bool:
    return isinstance(source, IterableDataset) or (
        type(source).__module__.startswith("datasets.") and not hasattr(source, "__getitem__")
    )


def _given_a_list(own: Collate, rows: Sequence[Any]) -> Any:
    """Collators of other people look whether they are given a list."""
    return own(list(rows))


def collated(rows: Sequence[Any]) -> Any:
    """A batch of tensors; texts and other objects become lists."""
    if isinstance(rows, TokenRows):
        return rows.batch()
    if rows and isinstance(rows[0], Mapping):
        return {name: _of_columns([row[name] for row in rows]) for name in rows[0]}
    return _column(list(rows))


def _of_columns(values: list[Any]) -> Any:
    """A column of lists is one tensor where they are numbers of one shape, else lists; torch would turn them round."""
    first = values[0] if values else None
    if isinstance(first, Mapping) and all(isinstance(row, Mapping) and row.keys() == first.keys() for row in values):
        return {name: _of_columns([row[name] for row in values]) for name in first}
    if not isinstance(first, list):
        return _column(values)
    try:
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return values


def _column(values: list[Any]) -> Any:
    if any(value is None for value in values):
        return values
    try:
        return default_collate(values)
    except TypeError:
        return values
