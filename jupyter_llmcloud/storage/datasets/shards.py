"""Shards: Parquet files that are written aside and renamed, checked before they are trained on, read by row groups."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.storage.datasets import filesystem
from jupyter_llmcloud.storage.datasets.manifest import SHARDS, Manifest, Shard

HASH_ALL_BELOW = 256 << 20  # bytes of a data set whose content is checked whole before training
_THREADS = 16
_AGAIN = "Prepare the data again: %prepare writes only the shards that are missing."


class ShardWriter:
    """Writes one shard. A context: what is not finished leaves nothing behind.

    Attributes:
        schema: of its columns.
        rows: of each row group so far.
    """

    def __init__(self, url: str, schema: Any, options: Mapping[str, Any] | None = None) -> None:
        import pyarrow.parquet as parquet

        self._url = url
        self._options = options
        self.schema = schema
        self.rows: list[int] = []
        self._file = filesystem.scratch()
        self._writer = parquet.ParquetWriter(
            self._file, schema, compression="zstd", write_page_checksum=True, use_dictionary=False
        )

    def write(self, columns: Mapping[str, Any]) -> None:
        """Write one row group."""
        import pyarrow as pa

        table = pa.Table.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
            self.rows.append(table.num_rows)

    def finish(self) -> tuple[int, str]:
        """Put the shard in its place; returns its size and SHA-256."""
        self._writer.close()
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        filesystem.put(self._file, self._url, self._options)
        return size, digest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        with self._file:
            self._writer.close()


class ShardReader:
    """The row groups of a data set, numbered over all shards.

    Attributes:
        manifest: of the data set.
        groups: how many rows each row group has.
    """

    def __init__(self, url: str, manifest: Manifest, options: Mapping[str, Any] | None = None) -> None:
        self.manifest = manifest
        self._url = url
        self._options = options
        self._places = [(shard, at) for shard in manifest.shards for at in range(len(shard.rows))]
        self.groups = [shard.rows[at] for shard, at in self._places]

    def check(self) -> None:
        """Raise UsageError that names every shard which is missing or not what was written.

        Sizes always; the content of all when there is little of it. Beyond that Parquet's checksums are checked as
        the pages are read.
        """
        there = filesystem.names_in(filesystem.join(self._url, SHARDS), self._options)
        shards = self.manifest.shards
        if missing := [shard.name for shard in shards if shard.name not in there]:
            raise UsageError(f"{self._url!r} lacks {_several(missing, len(shards))}. {_AGAIN}")
        if changed := [shard.name for shard in shards if there[shard.name] != shard.bytes]:
            raise UsageError(f"{self._url!r}: {_several(changed, len(shards))} changed since the manifest. {_AGAIN}")
        if sum(shard.bytes for shard in shards) > HASH_ALL_BELOW:
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            hashes = list(pool.map(self._hash, shards))
        if changed := [shard.name for shard, found in zip(shards, hashes, strict=True) if found != shard.sha256]:
            raise UsageError(f"{self._url!r}: {_several(changed, len(shards))} changed since the manifest. {_AGAIN}")

    def _hash(self, shard: Shard) -> str:
        return hashlib.sha256(filesystem.read_bytes(self._at(shard), self._options)).hexdigest()

    def _at(self, shard: Shard) -> str:
        return filesystem.join(self._url, SHARDS, shard.name)

    def read(self, group: int, columns: list[str] | None = None) -> Any:
        """A row group as an Arrow table. Raises UsageError when its shard cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        shard, at = self._places[group]
        fs, path = filesystem.filesystem(self._at(shard), self._options)
        try:
            with (
                filesystem.translated(self._at(shard)),
                fs.open(path, "rb") as file,
                parquet.ParquetFile(file, page_checksum_verification=True) as opened,
            ):
                return opened.read_row_group(at, columns=columns, use_threads=False)
        except (pa.ArrowException, LLMCloudError) as error:
            raise UsageError(f"the shard {self._at(shard)!r} cannot be read: {error}. {_AGAIN}") from None


def schema_of(url: str, options: Mapping[str, Any] | None = None) -> Any:
    """The Arrow schema of a shard. Raises NotFound, UsageError."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    fs, path = filesystem.filesystem(url, options)
    try:
        with filesystem.translated(url), fs.open(path, "rb") as file:
            return parquet.read_schema(file).remove_metadata()
    except pa.ArrowException as error:
        raise UsageError(f"the shard {url!r} cannot be read: {error}. {_AGAIN}") from None


def _several(names: list[str], of: int) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} of its {of} shards ({', '.join(names[:3])}{more})"


def read_all(url: str, manifest: Manifest, options: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """Every row group of a data set, in order, as Arrow tables."""
    reader = ShardReader(url, manifest, options)
    for group in range(len(reader.groups)):
        yield reader.read(group)
