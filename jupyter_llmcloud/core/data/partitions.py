"""How the files of a source are cut into partitions: pieces of files that are prepared together, into one shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

FORMATS = ("text", "jsonl", "csv", "parquet", "images")
_BY_LINES = ("text", "jsonl")  # a line is a row, so that a file can be cut at any line
_ENDINGS = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "images": (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"),
}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
WHOLE = -1  # the end of a piece that is a whole file


@dataclass(frozen=True)
class SourceFile:
    """A file as it was listed.

    Attributes:
        url: where it is.
        size: in bytes.
        version: changes with its content: an ETag, or the time of its last change.
        row_groups: the bytes of each, of a Parquet file that is worth cutting.
    """

    url: str
    size: int
    version: str = ""
    row_groups: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its last part without what a URL says behind it."""
        return self.url.rsplit("/", 1)[-1].split("?", 1)[0]


@dataclass(frozen=True)
class Piece:
    """A part of a file: bytes from `start` to `end` (lines that begin there), or row groups of a Parquet file."""

    url: str
    start: int = 0
    end: int = WHOLE


@dataclass(frozen=True)
class Partition:
    """What one shard is made of.

    Attributes:
        pieces: in the order of the source.
        key: the same for the same pieces of files that have not changed.
        num_bytes: of its pieces, as they are stored.
    """

    pieces: tuple[Piece, ...]
    key: str
    num_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """In values that JSON can carry."""
        return {**asdict(self), "pieces": [asdict(piece) for piece in self.pieces]}

    @classmethod
    def restore(cls, kept: Mapping[str, Any]) -> Partition:
        """What `as_dict` gave."""
        return cls(tuple(Piece(**piece) for piece in kept["pieces"]), kept["key"], kept["num_bytes"])


def compression_of(name: str) -> str | None:
    """By the end of a file's name: gzip, bz2, xz, zstd, lz4; None for a plain file."""
    return next((kind for ending, kind in COMPRESSED.items() if name.lower().endswith(ending)), None)


def format_of(name: str) -> str | None:
    """The format that a file's name tells; None for one that tells none."""
    plain = name.lower()
    for ending in COMPRESSED:
        plain = plain.removesuffix(ending)
    return next((kind for kind, endings in _ENDINGS.items() if plain.endswith(endings)), None)


def cut(files: Iterable[SourceFile], kind: str, partition_bytes: int) -> list[Partition]:
    """Partitions of about `partition_bytes`, in the order of the files; the same for the same files.

    A large file is cut where its format allows it; small ones are put together. A compressed file, and a CSV file,
    whose lines may be parts of rows, stay whole: they are read as a stream.
    """
    partitions: list[Partition] = []
    pieces: list[tuple[Piece, SourceFile, int]] = []
    size = 0

    def close() -> None:
        nonlocal size
        if pieces:
            partitions.append(_partition(pieces))
        pieces.clear()
        size = 0

    for file in files:
        for piece, num_bytes in _pieces(file, kind, partition_bytes):
            if size and size + num_bytes > partition_bytes:
                close()
            pieces.append((piece, file, num_bytes))
            size += num_bytes
    close()
    return partitions


def _pieces(file: SourceFile, kind: str, partition_bytes: int) -> Iterable[tuple[Piece, int]]:
    if file.size > partition_bytes and kind in _BY_LINES and compression_of(file.name) is None:
        count = -(-file.size // partition_bytes)
        bounds = [file.size * number // count for number in range(count + 1)]
        return [(Piece(file.url, a, b), b - a) for a, b in pairwise(bounds)]
    if kind == "parquet" and len(file.row_groups) > 1:
        return list(_row_groups(file, partition_bytes))
    return [(Piece(file.url), file.size)]


def _row_groups(file: SourceFile, partition_bytes: int) -> Iterable[tuple[Piece, int]]:
    first = size = 0
    for number, num_bytes in enumerate(file.row_groups):
        if size and size + num_bytes > partition_bytes:
            yield Piece(file.url, first, number), size
            first, size = number, 0
        size += num_bytes
    yield Piece(file.url, first, len(file.row_groups)), size


def _partition(pieces: Sequence[tuple[Piece, SourceFile, int]]) -> Partition:
    told = [[piece.url, piece.start, piece.end, file.size, file.version] for piece, file, _ in pieces]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]
    return Partition(tuple(piece for piece, _, _ in pieces), key, sum(size for _, _, size in pieces))
