"""Preparing data in one process: a recipe, files of every format, and the rows that a source becomes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from jupyter_llmcloud.cluster.data import planning
from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.cluster.data.work import PartitionWork
from jupyter_llmcloud.storage.datasets.manifest import CleaningStep, Shard
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer


def letters(text: str) -> list[int]:
    """A tokenizer: the code of each letter."""
    return [ord(letter) for letter in text]


def recipe(out: Path | str, *steps: str, seq_len: int | None = None, **options: Any) -> Recipe:
    """Cleaning by steps of ours; with `seq_len` texts become their letters."""
    own: dict[str, Any] = {"steps": {}}
    if seq_len is not None:
        options["tokenizer"], own["tokenizer"] = pack_tokenizer(letters)
    named = tuple(CleaningStep(name=step) for step in steps)
    return Recipe(
        **{"kind": "auto", "out": str(out), "seq_len": seq_len, "steps": named, "own": pickle.dumps(own), **options}
    )


def prepared(made: Recipe, *sources: Path | str, partition_bytes: int = 1 << 20) -> list[dict[str, Any]]:
    """The rows that a source becomes, partition by partition, in one process and without duplicates looked for."""
    plan = planning.plan(made, [str(source) for source in sources], partition_bytes)
    work = PartitionWork(plan.recipe)
    schema = b"" if made.tokenizer else work.sample(plan.partitions[0])
    return [row for part in plan.partitions for row in rows_of(made, work.shard(part, schema, ([], []), {}, None))]


def rows_of(made: Recipe, shard: Shard) -> list[dict[str, Any]]:
    """What was written, as it is counted."""
    table: pa.Table = parquet.read_table(Path(made.out) / "shards" / shard.name)
    rows: list[dict[str, Any]] = table.to_pylist()
    assert len(rows) == shard.num_rows
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of JSON lines."""
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.with_suffix(".jsonl")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows of a number and a text as CSV."""
    lines = [f'{row["number"]},"{row["text"]}"' for row in rows]
    path.with_suffix(".csv").write_text("number,text\n" + "\n".join(lines) + "\n")
    return path.with_suffix(".csv")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as Parquet, in small row groups."""
    parquet.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"), row_group_size=7)
    return path.with_suffix(".parquet")
