"""What may be asked for when data is prepared: every option, defined once, as in `core.spec`."""
# ruff: noqa: RUF009 - option() makes a field

from __future__ import annotations

import codecs
from dataclasses import dataclass

from jupyter_llmcloud.core.data.partitions import FORMATS
from jupyter_llmcloud.core.data.step_names import parse_steps
from jupyter_llmcloud.core.names import parse_size
from jupyter_llmcloud.core.options import Option, Syntax, integer
from jupyter_llmcloud.core.spec import (
    CLUSTER,
    COUNT,
    SIZE,
    SWITCH,
    TEXT,
    Interface,
    OptionType,
    Spec,
    option,
)
from jupyter_llmcloud.errors import UsageError

DEFAULT_PARTITION = 32 << 20


def _parse_columns(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"expected names of columns separated by commas, not {text!r}")
    return names


def _parse_threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 1:
        raise UsageError(f"expected a similarity from 0.1 to 1, not {text!r}")
    return value


COLUMN_TYPES = ("string", "int64", "int32", "float64", "float32", "bool")


def _parse_types(text: str) -> list[str]:
    found = _parse_columns(text)
    for item in found:
        name, _, kind = item.rpartition("=")
        if not name or kind not in COLUMN_TYPES:
            raise UsageError(f"expected column=type with one of {', '.join(COLUMN_TYPES)}, not {item!r}")
    return found


def _parse_encoding(text: str) -> str:
    try:
        "".encode(text)
        return codecs.lookup(text).name
    except LookupError:
        raise UsageError(f"{text!r} is no encoding of texts: utf-8, latin-1, cp1252, utf-16, ...") from None


def _parse_partition(text: str) -> int:
    if (size := parse_size(text)) < 1024:
        raise UsageError(f"expected at least 1KiB, not {text!r}")
    return size


@dataclass(frozen=True, kw_only=True)
class PrepareSpec(Spec):
    """How a source becomes shards that ranks train on."""

    out: str | None = option(TEXT, "Folder or URL of the prepared data: local, s3://, hdfs://, ...", metavar="URL")
    tokenizer: str | None = option(
        TEXT,
        "Folder with a tokenizer.json, or a name on the Hugging Face hub; without one rows keep their columns.",
        metavar="NAME",
    )
    seq_len: int | None = option(COUNT, "Tokens of a row; documents are packed one after the other.")
    format: str = option(
        OptionType(values=("auto", *FORMATS)), "Format of the source (auto: as the names of its files say).", "auto"
    )
    text_column: str = option(TEXT, "Column that holds the text, of jsonl, csv and parquet.", "text", metavar="COLUMN")
    unit: str = option(OptionType(values=("line", "paragraph", "file")), "What a document is in a text file.", "line")
    steps: list[str] | None = option(
        OptionType("a,b", parse_steps, names="cleaning steps"),
        "Cleaning, in order: strip, nfc, nfkc, lowercase, whitespace, html, urls, emails, control, drop-empty, "
        "drop-short:N, drop-long:N, drop-symbols:N; in Python functions of your own as well.",
    )
    dedup: str = option(
        OptionType(values=("none", "exact", "near")),
        "Drop documents that are equal (exact), or also those that are alike (near, by MinHash); the first one stays.",
        "none",
    )
    threshold: float = option(
        OptionType("SHARE", _parse_threshold), "Of near: the Jaccard similarity of five-word runs from which on.", 0.8
    )
    normalize: list[str] | None = option(
        OptionType("a,b", _parse_columns), "Columns of numbers that get mean 0 and standard deviation 1."
    )
    image_size: int | None = option(COUNT, "Side in pixels to which images are brought (default: kept as they are).")
    encoding: str = option(
        OptionType("NAME", _parse_encoding), "Encoding of text, jsonl and csv: latin-1, cp1252, utf-16, ...", "utf-8"
    )
    types: list[str] | None = option(
        OptionType("a=TYPE,b=TYPE", _parse_types),
        "Columns whose values do not tell their type: string, int64, int32, float64, float32 or bool.",
    )
    bad_rows: str = option(
        OptionType(values=("error", "skip")),
        "What cannot be read ends it, or is left out and counted (skip).",
        "error",
    )
    partition_size: int = option(
        OptionType(SIZE.metavar, _parse_partition), "Bytes of the source for one task and one shard.", DEFAULT_PARTITION
    )
    processes: int | None = option(
        OptionType("N", integer(1)), "Processes on each worker (default: the cores of its host)."
    )
    overwrite: bool = option(SWITCH, "Replace data in the folder that was prepared otherwise.", False)
    cluster: str | None = option(CLUSTER, "The cluster to prepare on (default: the newest).", interfaces=Interface.ANY)

    def checked(self) -> PrepareSpec:
        """Itself, when its options fit each other. Raises UsageError."""
        if not self.out:
            raise UsageError("where should the prepared data go? Say it: --out URL (out=).")
        if (self.tokenizer is None) != (self.seq_len is None):
            missing, given = ("seq_len", "tokenizer") if self.tokenizer else ("tokenizer", "seq_len")
            raise UsageError(f"{given} is given without {missing}: tokens are packed to rows with both.")
        return self


PREPARE = Syntax(
    "%prepare",
    PrepareSpec.options(Interface.NOTEBOOK),
    "SOURCE...",
    "Clean, deduplicate, tokenize and pack data on the cluster, into Parquet shards with a manifest.",
)
SHARDS = Syntax(
    "%shards",
    (
        Option(("-n", "--nproc"), "Also which rank of so many takes how much.", metavar="N", parse=integer(1)),
        Option(("--limit",), "How many shards are listed, the largest first (20).", metavar="N", parse=integer(1)),
    ),
    "URL",
    "The shards of prepared data: what they hold, where they were written, how uneven they are.",
)
