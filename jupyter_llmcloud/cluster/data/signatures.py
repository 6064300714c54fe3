"""What is kept of every document to find its duplicates: a hash of its text, and a MinHash signature cut into bands.

MinHash and its bands as in Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, chapter 3; both from datasketch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jupyter_llmcloud.storage.datasets import filesystem

FOLDER = "signatures"
NUM_PERM = 128
NUM_BUCKETS = 64  # parts by which duplicates are looked for, so that not all hashes need be in memory at once
SHINGLE = 5  # words
_WORD = re.compile(r"\w+")


@cache
def bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many values: few similar pairs are missed; those too many are found by comparing."""
    from datasketch import MinHashLSH

    found = MinHashLSH(threshold=threshold, num_perm=NUM_PERM, weights=(0.1, 0.9))
    return found.b, found.r


class Signatures:
    """Of the documents of a partition, in their order.

    Args:
        threshold: of near duplicates; None: only equal documents are looked for.
    """

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._hashes: list[bytes] = []
        self._minhashes: list[Any] = []
        self._minhash: Any = None
        if threshold is not None:
            from datasketch import MinHash

            self._minhash = MinHash(num_perm=NUM_PERM, hashfunc=_number)

    def add(self, texts: Sequence[str]) -> None:
        """Documents that follow."""
        import numpy as np

        for text in texts:
            self._hashes.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
            if self._minhash is not None:
                self._minhash.clear()
                self._minhash.update_batch(shingles(text))
                self._minhashes.append(self._minhash.hashvalues.astype(np.uint32))

    def save(self, url: str, storage: Mapping[str, Any]) -> None:
        """Write `url`.keys.parquet, a row group for each bucket, and `url`.minhash.parquet."""
        import numpy as np
        import pyarrow as pa

        num = len(self._hashes)
        pairs = np.frombuffer(b"".join(self._hashes), "<u8").reshape(num, 2)
        keys, checks, documents = [pairs[:, 0]], [pairs[:, 1]], [np.arange(num, dtype=np.uint32)]
        if self._threshold is not None and num:
            values = np.stack(self._minhashes)
            for band in _band_keys(values, self._threshold):
                keys.append(band)
                checks.append(np.zeros(num, np.uint64))  # no hash of a text: what shares a band is compared
                documents.append(documents[0])
            flat = pa.array(values.reshape(-1))
            table = pa.table({"values": pa.FixedSizeListArray.from_arrays(flat, NUM_PERM)})
            _write(f"{url}.minhash.parquet", [table], table.schema, storage)
        key, check, document = np.concatenate(keys), np.concatenate(checks), np.concatenate(documents)
        bucket = key % NUM_BUCKETS
        schema = pa.schema([("key", pa.uint64()), ("check", pa.uint64()), ("document", pa.uint32())])
        columns = [
            pa.table([key[of], check[of], document[of]], schema=schema)
            for number in range(NUM_BUCKETS)
            for of in [bucket == number]
        ]
        _write(f"{url}.keys.parquet", columns, schema, storage)


def shingles(text: str) -> list[bytes]:
    """Every five words that follow each other, in lower case; the whole text when it has fewer."""
    words = [word.encode() for word in _WORD.findall(text.lower())]
    if len(words) < SHINGLE:
        return [b" ".join(words) or text.encode()]
    return [b" ".join(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)]


def _number(shingle: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(shingle, digest_size=4).digest(), "little")


def _band_keys(values: Any, threshold: float) -> list[Any]:
    """For each band 64 bits of every document that are equal where its values are."""
    import numpy as np

    num_bands, width = bands(threshold)
    found = []
    for band in range(num_bands):
        state = np.full(len(values), band + 1, np.uint64)
        for column in range(band * width, (band + 1) * width):
            state = (state ^ values[:, column].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            state ^= state >> np.uint64(29)
        found.append(state)
    return found


def _write(url: str, tables: list[Any], schema: Any, storage: Mapping[str, Any]) -> None:
    """A Parquet file with a row group for each table, also for an empty one."""
    import pyarrow.parquet as parquet

    with filesystem.scratch() as file:
        with parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=max(1, table.num_rows))
        filesystem.put(file, url, storage)
