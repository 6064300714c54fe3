"""Duplicates over all partitions: found bucket by bucket in bounded memory; the first in the order of the source stays.

Of documents that are similar to each other, also by way of others between them, one stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.cluster.data.signatures import FOLDER
from jupyter_llmcloud.storage.datasets import filesystem

Pairs = list[tuple[int, int, int, int]]  # (partition, document) that comes first, (partition, document) like it


def find_pairs(
    out: str, keys: Sequence[str], buckets: Iterable[int], threshold: float | None, storage: Mapping[str, Any]
) -> tuple[Pairs, Pairs]:
    """Pairs of equal documents, and pairs of near ones, as far as their hashes fall into these buckets.

    Args:
        keys: of all partitions, in the order of the source.
        threshold: estimated Jaccard similarity from which on two documents are near.
    """
    exact: Pairs = []
    candidates: set[tuple[int, int, int, int]] = set()
    for bucket in buckets:
        found_exact, found_near = _in_bucket(out, keys, bucket, storage)
        exact += found_exact
        candidates.update(found_near)
    if not candidates or threshold is None:
        return exact, []
    return exact, _compared(out, keys, sorted(candidates), threshold, storage)


def _in_bucket(out: str, keys: Sequence[str], bucket: int, storage: Mapping[str, Any]) -> tuple[Pairs, Pairs]:
    import numpy as np
    import pyarrow.parquet as parquet

    columns: list[tuple[Any, Any, Any, Any]] = []
    for number, key in enumerate(keys):
        fs, path = filesystem.filesystem(filesystem.join(out, FOLDER, f"{key}.keys.parquet"), storage)
        with fs.open(path, "rb") as file, parquet.ParquetFile(file) as opened:
            table = opened.read_row_group(bucket, use_threads=False)
        hashes, checks, documents = (table.column(column).to_numpy() for column in ("key", "check", "document"))
        columns.append((hashes, checks, np.full(len(hashes), number, np.int64), documents.astype(np.int64)))
    hashed, check, partition, document = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((document, partition, check, hashed))
    hashed, check, partition, document = hashed[order], check[order], partition[order], document[order]
    same = np.flatnonzero((hashed[1:] == hashed[:-1]) & (check[1:] == check[:-1])) + 1  # like the one before
    is_first = np.ones(len(hashed), bool)
    is_first[same] = False
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(hashed)), 0))
    is_hash = check[same] != 0

    def pairs(members: Any, of: Any) -> Pairs:
        rows = (partition[of], document[of], partition[members], document[members])
        return list(zip(*(column.tolist() for column in rows), strict=True))

    near = same[~is_hash]
    of_first, before = pairs(near, first[near]), pairs(near, near - 1)
    return pairs(same[is_hash], first[same[is_hash]]), [p for p in {*of_first, *before} if p[:2] != p[2:]]


def _compared(out: str, keys: Sequence[str], pairs: Pairs, threshold: float, storage: Mapping[str, Any]) -> Pairs:
    import numpy as np
    import pyarrow.parquet as parquet

    wanted: dict[int, list[int]] = {}
    for a, i, b, j in pairs:
        wanted.setdefault(a, []).append(i)
        wanted.setdefault(b, []).append(j)
    places: dict[tuple[int, int], int] = {}
    found = []
    for number in sorted(wanted):
        documents = sorted({*wanted[number]})
        fs, path = filesystem.filesystem(filesystem.join(out, FOLDER, f"{keys[number]}.minhash.parquet"), storage)
        with fs.open(path, "rb") as file:
            column = parquet.read_table(file, use_threads=False).column("values").combine_chunks()
        values = column.flatten().to_numpy().reshape(len(column), -1)
        for document in documents:
            places[number, document] = len(places)
        found.append(values[documents].copy())
    values = np.concatenate(found)
    similar: Pairs = []
    for start in range(0, len(pairs), 1 << 16):
        some = pairs[start : start + (1 << 16)]
        left = [places[a, i] for a, i, _, _ in some]
        right = [places[b, j] for _, _, b, j in some]
        alike = (values[left] == values[right]).mean(axis=1) >= threshold
        similar += [pair for pair, is_alike in zip(some, alike.tolist(), strict=True) if is_alike]
    return similar


def to_drop(exact: Pairs, near: Pairs, settled: int = 0) -> dict[int, tuple[list[int], list[int]]]:
    """By partition the documents to drop: those equal to an earlier one, and those near to one.

    Args:
        settled: so many partitions at the beginning are written already, and keep what they have.
    """
    roots: dict[tuple[int, int], tuple[int, int]] = {}

    def root(item: tuple[int, int]) -> tuple[int, int]:
        path = []
        while (above := roots.get(item, item)) != item:
            path.append(item)
            item = above
        for below in path:
            roots[below] = item
        return item

    for a, i, b, j in [*exact, *near]:
        one, other = root((a, i)), root((b, j))
        if one != other:
            roots[max(one, other)] = min(one, other)
    equal = {(b, j) for _, _, b, j in exact}
    dropped: dict[int, tuple[list[int], list[int]]] = {}
    for item in {*roots}:
        if root(item) != item and item[0] >= settled:
            lists = dropped.setdefault(item[0], ([], []))
            lists[0 if item in equal else 1].append(item[1])
    return {number: (sorted(one), sorted(other)) for number, (one, other) in dropped.items()}
