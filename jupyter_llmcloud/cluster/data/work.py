"""What is done with one partition; carried out in a process of its own, knows nothing of Dask.

A recipe that must see all of the source first has two passes: the first cleans, keeps the documents beside the data
set and writes their signatures; the second writes the shard. Otherwise the second reads the source itself.
"""

from __future__ import annotations

import contextlib
import pickle
import platform
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jupyter_llmcloud.cluster.data import features, signatures
from jupyter_llmcloud.cluster.data.duplicates import Pairs, find_pairs
from jupyter_llmcloud.cluster.data.reading import Reader, arrow_type
from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.cluster.data.steps import Cleaning
from jupyter_llmcloud.cluster.data.tokens import Packer, encoder
from jupyter_llmcloud.core.data.partitions import Partition
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.datasets import filesystem
from jupyter_llmcloud.storage.datasets.columns import table_of, typed, unified
from jupyter_llmcloud.storage.datasets.manifest import SHARDS, Shard
from jupyter_llmcloud.storage.datasets.shards import ShardWriter

STAGED = "staged"
GROUP_TOKENS = 1 << 20  # of a row group
GROUP_ROWS = 1024
GROUP_BYTES = 16 << 20
SAMPLED_VALUES = 1 << 20  # of a partition whose columns are looked at
_TEXT = "\0text"  # the column of documents that are no rows
_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True)
class FirstPass:
    """What the first pass tells of a partition; it is also kept, as `staged/KEY.json`."""

    key: str
    documents: int
    filtered: int
    bad: int
    moments: dict[str, features.Moments] = field(default_factory=dict)


class PartitionWork:
    """Carries partitions of one recipe out, one after the other. The user's code is unpacked here, once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        own = pickle.loads(recipe.own) if recipe.own else {}
        self._cleaning = Cleaning([step.name for step in recipe.steps], own.get("steps", {}), recipe.column)
        self._encode = encoder(own["tokenizer"]) if recipe.tokenizer is not None else None

    # --- reading ---

    def _cleaned(
        self, partition: Partition, counts: dict[str, int], reader: Reader | None = None
    ) -> Iterator[list[Any]]:
        reader = reader or Reader(self._recipe)
        for batch in reader.batches(partition):
            clean = self._cleaning.row if batch and isinstance(batch[0], dict) else self._cleaning.text
            kept = [done for document in batch if (done := clean(document)) is not None]
            counts["filtered"] = counts.get("filtered", 0) + len(batch) - len(kept)
            counts["bad"] = reader.num_bad
            yield kept
        counts["bad"] = reader.num_bad

    def sample(self, partition: Partition) -> bytes:
        """The Arrow schema of the documents of a partition, or of the first ones of many, serialized."""
        import pyarrow as pa

        found: Any = None
        num_values = 0
        reader = Reader(self._recipe)
        for batch in self._cleaned(partition, {}, reader):
            if batch and not isinstance(batch[0], dict):
                return bytes(pa.schema([(self._recipe.column, pa.string())]).serialize())
            if not batch:
                continue
            schema = self._as_told(table_of(batch, reader.schema).schema)
            found = schema if found is None else unified([found, schema], "rows")
            num_values += len(batch) * len(schema)
            if num_values > SAMPLED_VALUES:
                break
        return b"" if found is None else bytes(found.serialize())

    def _as_told(self, schema: Any) -> Any:
        """With the types that were asked for."""
        import pyarrow as pa

        for name, kind in self._recipe.types:
            if (at := schema.get_field_index(name)) >= 0:
                schema = schema.set(at, pa.field(name, arrow_type(kind)))
        return schema

    # --- the first pass ---

    def first_pass(self, partition: Partition) -> FirstPass:
        """Clean, keep, sign; done before when what it tells is there."""
        recipe = self._recipe
        key = recipe.shard_key(partition.key)
        told = filesystem.join(recipe.out, STAGED, f"{key}.json")
        with contextlib.suppress(NotFound):
            return msgspec.json.decode(filesystem.read_bytes(told, recipe.storage), type=FirstPass)
        signed = signatures.Signatures(recipe.threshold if recipe.dedup == "near" else None)
        counts: dict[str, int] = {}
        parts, num = [], 0
        with _Staged(filesystem.join(recipe.out, STAGED, f"{key}.documents"), recipe) as staged:
            reader = Reader(recipe)
            for batch in self._cleaned(partition, counts, reader):
                staged.add(batch, reader.schema)
                num += len(batch)
                if recipe.dedup != "none":
                    signed.add([self._text(document) for document in batch])
                if recipe.normalize:
                    parts.append(features.moments(batch, recipe.normalize))
            if recipe.dedup != "none":
                signed.save(filesystem.join(recipe.out, signatures.FOLDER, key), recipe.storage)
            staged.finish()
        found = FirstPass(
            key, num, counts.get("filtered", 0), counts.get("bad", 0), features.together(parts) if parts else {}
        )
        filesystem.replace(told, msgspec.json.encode(found), recipe.storage)
        return found

    def _text(self, document: Any) -> str:
        """By what documents are compared: the text column where there is one, else the whole row."""
        if isinstance(document, str):
            return document
        if isinstance(text := document.get(self._recipe.column), str):
            return text
        return repr(sorted(document.items()))

    def pairs(self, keys: Sequence[str], buckets: Sequence[int]) -> tuple[Pairs, Pairs]:
        """Duplicates in these buckets, see `find_pairs`."""
        near = self._recipe.threshold if self._recipe.dedup == "near" else None
        return find_pairs(self._recipe.out, keys, buckets, near, self._recipe.storage)

    # --- the second pass ---

    def shard(
        self,
        partition: Partition,
        schema: bytes,
        dropped: tuple[Sequence[int], Sequence[int]],
        known: dict[str, list[float]],
        first: FirstPass | None,
    ) -> Shard:
        """Write the shard of a partition.

        Args:
            schema: of rows that are not tokens.
            dropped: numbers of documents equal to an earlier one, and near to one.
            known: mean and standard deviation of the columns to normalise.
        """
        recipe = self._recipe
        began = time.process_time()
        key = recipe.shard_key(partition.key)
        name = f"{key}.parquet"
        counts: dict[str, int] = {"filtered": first.filtered, "bad": first.bad} if first is not None else {}
        if first is None:
            documents = self._cleaned(partition, counts)
        else:
            documents = _staged(filesystem.join(recipe.out, STAGED, f"{key}.documents"), recipe)
        kept = _without(documents, {*dropped[0], *dropped[1]}, counts)
        rows = self._token_rows if self._encode is not None else self._column_rows
        url = filesystem.join(recipe.out, SHARDS, name)
        with ShardWriter(url, self.schema_of(recipe, schema), recipe.storage) as writer:
            tokens = rows(kept, writer, known)
            size, digest = writer.finish()
        written = Shard(
            name=name,
            key=partition.key,
            rows=writer.rows,
            bytes=size,
            sha256=digest,
            tokens=tokens,
            documents=counts.get("kept", 0),
            filtered=counts.get("filtered", 0),
            exact=len(dropped[0]),
            near=len(dropped[1]),
            bad=counts.get("bad", 0),
            sources=list(dict.fromkeys(piece.url for piece in partition.pieces)),
            host=platform.node(),
            seconds=round(time.process_time() - began, 3),
        )
        filesystem.replace(
            filesystem.join(recipe.out, STAGED, recipe.finished_name(partition.key)),
            msgspec.json.encode(written),
            recipe.storage,
        )
        return written

    @staticmethod
    def schema_of(recipe: Recipe, of_rows: bytes) -> Any:
        """Of the shards; `of_rows`: of rows that are neither tokens nor images."""
        import pyarrow as pa

        if recipe.tokenizer is not None and recipe.seq_len is not None:
            kind = pa.uint16() if Packer(recipe.tokenizer, 1).dtype.itemsize == 2 else pa.int32()
            return pa.schema([("input_ids", pa.list_(kind, recipe.seq_len)), ("length", pa.int32())])
        if recipe.kind == "images":
            of_images = pa.binary() if recipe.image_size is None else pa.binary(3 * recipe.image_size**2)
            return pa.schema([("image", of_images), ("label", pa.int64())])
        found = pa.ipc.read_schema(pa.py_buffer(of_rows))
        for name in recipe.normalize:
            found = found.set(found.get_field_index(name), pa.field(name, pa.float32()))
        return found

    def _token_rows(self, batches: Iterator[list[str]], writer: ShardWriter, known: Any) -> int:
        import numpy as np
        import pyarrow as pa

        recipe = self._recipe
        assert recipe.tokenizer is not None and recipe.seq_len is not None and self._encode is not None
        packer = Packer(recipe.tokenizer, recipe.seq_len)
        waiting: list[Any] = []
        at_once = max(1, GROUP_TOKENS // recipe.seq_len)

        def write(rows: Any, last: int | None = None) -> None:
            lengths = np.full(len(rows), recipe.seq_len, np.int32)
            if last is not None:
                lengths[-1] = last
            flat = pa.array(rows.reshape(-1))
            ids = pa.FixedSizeListArray.from_arrays(flat, recipe.seq_len)
            writer.write({"input_ids": ids, "length": pa.array(lengths)})

        for batch in batches:
            waiting.append(packer.add(self._encode(batch)))
            if sum(map(len, waiting)) >= at_once:
                rows = np.concatenate(waiting)
                for start in range(0, len(rows) - at_once + 1, at_once):
                    write(rows[start : start + at_once])
                waiting = [rows[len(rows) - len(rows) % at_once :]]
        tail, length = packer.finish()
        rows = np.concatenate([*waiting, tail]) if waiting else tail
        if len(rows):
            write(rows, length or None)
        return packer.num_tokens

    def _column_rows(self, batches: Iterator[list[Any]], writer: ShardWriter, known: dict[str, list[float]]) -> int:
        import pyarrow as pa

        schema = writer.schema
        waiting: list[dict[str, Any]] = []
        for batch in batches:
            rows = batch if not batch or isinstance(batch[0], dict) else [{self._recipe.column: t} for t in batch]
            waiting += [features.normalized(row, known) for row in rows] if known else rows
            if len(waiting) >= GROUP_ROWS or _size(waiting) >= GROUP_BYTES:
                self._write_columns(waiting, schema, writer, pa)
                waiting = []
        if waiting:
            self._write_columns(waiting, schema, writer, pa)
        return 0

    @staticmethod
    def _write_columns(rows: list[dict[str, Any]], schema: Any, writer: ShardWriter, pa: Any) -> None:
        columns = {}
        for column in schema:
            values = [row.get(column.name) for row in rows]
            try:
                columns[column.name] = typed(values, column.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, OverflowError) as error:
                raise UsageError(
                    f"the column {column.name!r} is {column.type} in the first rows of the source, and later holds "
                    f"something else: {str(error).rstrip('.')}. Say what it is (types='{column.name}=float64'), or "
                    "bring it to one type by a step of your own."
                ) from None
        if more := {name for row in rows for name in row} - {*schema.names}:
            raise UsageError(
                f"rows have the column {min(more)!r}, which the first rows of the source do not have (they have "
                f"{', '.join(schema.names)}). Take it away, or add it everywhere, by a step of your own."
            )
        writer.write(columns)


def _size(rows: list[dict[str, Any]]) -> int:
    return sum(len(value) for row in rows for value in row.values() if isinstance(value, bytes | str))


def _without(batches: Iterator[list[Any]], dropped: set[int], counts: dict[str, int]) -> Iterator[list[Any]]:
    """Batches without the documents of these numbers."""
    number = 0
    counts["kept"] = 0
    for batch in batches:
        kept = [document for at, document in enumerate(batch, number) if at not in dropped] if dropped else batch
        number += len(batch)
        counts["kept"] += len(kept)
        yield kept


class _Staged:
    """Cleaned documents on their way to a file beside the data set: Arrow tables, each behind its length."""

    def __init__(self, url: str, recipe: Recipe) -> None:
        self._url, self._recipe = url, recipe
        self._file = filesystem.scratch()

    def add(self, batch: list[Any], schema: Any = None) -> None:
        """A batch that follows; `schema`: of the file it comes from, where that has one."""
        import pyarrow as pa

        is_rows = bool(batch) and isinstance(batch[0], dict)
        table = table_of(batch, schema) if is_rows else pa.table({_TEXT: pa.array(batch, pa.string())})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        self._file.write(_LENGTH.pack(content.size))
        self._file.write(content)

    def finish(self) -> None:
        """Put it in its place."""
        filesystem.put(self._file, self._url, self._recipe.storage)

    def __enter__(self) -> _Staged:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def _staged(url: str, recipe: Recipe) -> Iterator[list[Any]]:
    import pyarrow as pa

    fs, path = filesystem.filesystem(url, recipe.storage)
    with filesystem.translated(url), fs.open(path, "rb") as file:
        while head := file.read(_LENGTH.size):
            table = pa.ipc.open_stream(file.read(*_LENGTH.unpack(head))).read_all()
            yield table.column(_TEXT).to_pylist() if table.schema.names == [_TEXT] else table.to_pylist()
