"""What a preparation does with every partition: as the options say it, with the user's own steps and tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.storage.datasets.manifest import CleaningStep, Tokenizer

Clean = Callable[[Any], Any]
_SHARD_KEY = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True)
class Recipe:
    """Sent to the workers; `own` is unpacked only there, in the process that carries a partition out.

    Attributes:
        kind: the format of the source.
        out: URL of the data set.
        column: of a row, the one that holds its text.
        seq_len: tokens of a row; None: rows keep their columns.
        unit: what a document is in a text file: line, paragraph or file.
        steps: their names, in order; those of the user's own functions are keys of `own`.
        tokenizer: what is kept of it; None: nothing is tokenized.
        own: cloudpickled {"steps": {name: function}, "tokenizer": as `tokens.pack_tokenizer` gives it}.
        dedup: none, exact or near; threshold: Jaccard similarity of near duplicates.
        normalize: columns of numbers that get mean 0 and standard deviation 1.
        image_size: side of the square that images are brought to; None: files as they are.
        classes: of images: the names of their folders, by label.
        skip_bad: leave out, and count, what cannot be read.
        encoding: of text, jsonl and csv.
        types: (column, name of its Arrow type), where it is not told by the values.
        whole: names all that is prepared together, where that decides about each of its shards (see `depends_on_all`).
        storage: options for fsspec; never kept.
    """

    kind: str
    out: str
    column: str = "text"
    seq_len: int | None = None
    unit: str = "line"
    steps: tuple[CleaningStep, ...] = ()
    tokenizer: Tokenizer | None = None
    own: bytes = field(default=b"", repr=False)
    dedup: str = "none"
    threshold: float = 0.8
    normalize: tuple[str, ...] = ()
    image_size: int | None = None
    classes: tuple[str, ...] = ()
    skip_bad: bool = False
    encoding: str = "utf-8"
    types: tuple[tuple[str, str], ...] = ()
    whole: str = ""
    storage: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def has_first_pass(self) -> bool:
        """Whether all of the source must be seen before the first shard can be written."""
        return self.dedup != "none" or bool(self.normalize)

    @property
    def depends_on_all(self) -> bool:
        """Whether a shard depends on the other partitions: by duplicates, by means, or by the types of its columns."""
        return self.has_first_pass or (self.tokenizer is None and self.kind != "images")

    def described(self) -> dict[str, Any]:
        """What decides the rows of a shard, besides its partition: kept in the manifest."""
        told: dict[str, Any] = {
            "format": self.kind,
            "column": self.column,
            "seq_len": self.seq_len,
            "unit": self.unit,
            "steps": [f"{step.name}@{step.source_hash[:12]}" if step.source_hash else step.name for step in self.steps],
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer is not None else None,
            "dedup": self.dedup if self.dedup != "near" else f"near {self.threshold:g}",
            "normalize": list(self.normalize),
            "image_size": self.image_size,
            "skip_bad": self.skip_bad,
        }
        if self.encoding != "utf-8":
            told["encoding"] = self.encoding
        if self.types:
            told["types"] = [f"{name}={kind}" for name, kind in self.types]
        return told

    def shard_key(self, partition_key: str) -> str:
        """The name of the shard that this makes of a partition."""
        told = repr(sorted(self.described().items())) + partition_key
        if self.classes:  # whose numbers are in the shard
            told += repr(self.classes)
        return hashlib.sha256(told.encode()).hexdigest()[:20]

    def finished_name(self, partition_key: str) -> str:
        """What is told of that shard once it is written is kept under this name until there is a manifest."""
        whole = f".{self.whole}" if self.whole else ""
        return f"{self.shard_key(partition_key)}.parquet{whole}.json"


def is_shard_key(name: str) -> bool:
    """Whether this may be what `Recipe.shard_key` gave."""
    return _SHARD_KEY.fullmatch(name) is not None
