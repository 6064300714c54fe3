"""A data set that is gone on with, after its source or the preparation itself was cut short: each row once, all alike."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jupyter_llmcloud.cluster.data import planning
from jupyter_llmcloud.cluster.data.preparation import Preparation, PreparationProgress
from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.cluster.data.work import PartitionWork
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.manifest import Manifest
from jupyter_llmcloud.storage.datasets.shards import read_all


class _Killed(Exception):
    """The host is gone."""


class _InOneProcess(Preparation):
    """Carries partitions out where it is.

    Args:
        shards: after so many it is killed; None: it is not.
    """

    def __init__(self, plan: planning.PreparationPlan, shards: int | None = None) -> None:
        super().__init__(None, plan, PreparationProgress())  # type: ignore[arg-type]
        self._work = PartitionWork(plan.recipe)
        self._left = shards

    async def _map(
        self,
        method: str,
        items: Sequence[Any],
        arguments: Callable[[Any], tuple[Any, ...]],
        take: Callable[[Any, Any], None],
    ) -> None:
        for item in items:
            if method == "shard" and self._left == 0:
                break
            take(item, getattr(self._work, method)(*arguments(item)))
            if method == "shard" and self._left is not None:
                self._left -= 1
        if method == "shard" and self._left == 0:
            raise _Killed

    async def _end_processes(self) -> None:
        """There are none."""


def recipe(out: Path, **options: Any) -> Recipe:
    return Recipe(**{"kind": "auto", "out": str(out), "own": pickle.dumps({"steps": {}}), **options})


def prepare(made: Recipe, source: Path, killed_after: int | None = None) -> Manifest:
    """Each file is a partition."""
    largest = max(file.stat().st_size for file in source.rglob("*") if file.is_file())
    plan = planning.plan(made, [str(source)], largest)
    return asyncio.run(_InOneProcess(plan, killed_after).run())


def rows_of(made: Recipe, found: Manifest) -> list[dict[str, Any]]:
    return [row for table in read_all(made.out, found) for row in table.to_pylist()]


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_preparation_that_was_killed_before_its_manifest_is_finished(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.jsonl", {"x": float(number), "y": number})
    made = recipe(tmp_path / "out", normalize=("x",))
    with pytest.raises(_Killed):
        prepare(made, tmp_path / "in", killed_after=3)
    found = prepare(made, tmp_path / "in")
    assert found.columns == {"x": "float", "y": "int64"}
    assert found.statistics["x"] == pytest.approx([1.0, (2 / 3) ** 0.5])
    assert [row["y"] for row in rows_of(made, found)] == [0, 1, 2]


def test_shards_that_were_normalised_by_less_than_the_whole_are_made_again(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "in" / f"{number}.jsonl", {"x": float(number)})
    made = recipe(tmp_path / "out", normalize=("x",))
    with pytest.raises(_Killed):
        prepare(made, tmp_path / "in", killed_after=2)
    write(tmp_path / "in" / "3.jsonl", {"x": 1000.0})
    found = prepare(made, tmp_path / "in")
    mean, deviation = found.statistics["x"]
    back = [row["x"] * deviation + mean for row in rows_of(made, found)]
    assert back == pytest.approx([0.0, 1.0, 2.0, 1000.0], abs=1e-3)


def test_shards_whose_duplicates_were_looked_for_in_less_than_the_whole_are_made_again(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / "in" / f"{number}.jsonl", {"text": f"only in {number}"}, {"text": f"also at first {number}"})
    made = recipe(tmp_path / "out", dedup="exact")
    with pytest.raises(_Killed):
        prepare(made, tmp_path / "in", killed_after=1)
    write(tmp_path / "in" / "0-first.jsonl", {"text": "also at first 0"}, {"text": "also at first 1"})
    texts = [row["text"] for row in rows_of(made, prepare(made, tmp_path / "in"))]
    assert sorted(texts) == ["also at first 0", "also at first 1", "only in 0", "only in 1"]


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_images_have_the_labels_of_the_classes_that_there_are_in_the_end(tmp_path: Path, dedup: str) -> None:
    def add(name: str, colour: int) -> None:
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2), (colour, colour, colour)).save(tmp_path / "in" / name / "a.png")

    add("cat", 10)
    add("dog", 20)
    made = recipe(tmp_path / "out", image_size=2, dedup=dedup)
    with pytest.raises(_Killed):
        prepare(made, tmp_path / "in", killed_after=1)
    add("ant", 0)
    found = prepare(made, tmp_path / "in")
    told = {row["image"][0]: found.classes[row["label"]] for row in rows_of(made, found)}
    assert told == {0: "ant", 10: "cat", 20: "dog"}


@pytest.mark.parametrize("what", ["gone", "changed", "lost"])
def test_a_document_stays_when_the_file_is_gone_whose_copy_of_it_was_kept(tmp_path: Path, what: str) -> None:
    source, made = tmp_path / "in", recipe(tmp_path / "out", dedup="exact")
    first = write(source / "0.jsonl", {"text": "twice"}, {"text": "of the first"})
    write(source / "1.jsonl", {"text": "twice"}, {"text": "of the second"})
    write(source / "2.jsonl", {"text": "of the third"})
    found = prepare(made, source)
    third = found.shards[2]
    if what == "gone":
        first.unlink()
    elif what == "changed":
        write(first, {"text": "another one"})
    else:
        (Path(made.out) / "shards" / found.shards[0].name).unlink()
    left = {"gone": [], "changed": ["another one"], "lost": ["of the first"]}[what]
    found = prepare(made, source)
    texts = [row["text"] for row in rows_of(made, found)]
    assert sorted(texts) == sorted(["twice", "of the second", "of the third", *left])
    assert third in found.shards, "what has nothing to do with it is not made again"


def test_rows_that_are_added_have_the_columns_of_those_there_are(tmp_path: Path) -> None:
    source, made = tmp_path / "in", recipe(tmp_path / "out")
    write(source / "0.jsonl", {"a": 1.5, "b": "x"})
    prepare(made, source)
    write(source / "1.jsonl", {"a": 2})
    found = prepare(made, source)
    assert rows_of(made, found) == [{"a": 1.5, "b": "x"}, {"a": 2.0, "b": None}]
    assert found.columns == {"a": "double", "b": "string"}
    write(source / "2.jsonl", {"a": 3.0, "b": "y", "c": 1})
    with pytest.raises(UsageError, match="rows have the column 'c'"):
        prepare(made, source)
    write(source / "2.jsonl", {"a": "three", "b": "y"})
    with pytest.raises(UsageError, match="the column 'a' is double"):
        prepare(made, source)


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    source, made = tmp_path / "in", recipe(tmp_path / "out", dedup="exact")
    write(source / "0.jsonl", {"text": "a"})
    others = [tmp_path / "out" / name / "train-00000.parquet" for name in ("shards", "staged", "signatures")]
    for file in others:
        file.parent.mkdir(parents=True)
        file.write_text("theirs")
    found = prepare(made, source)
    write(source / "0.jsonl", {"text": "b"})
    prepare(made, source)
    assert [file.read_text() for file in others] == ["theirs"] * 3
    left = {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()} - {file.name for file in others}
    assert len(left) == 3 and found.shards[0].name not in left, "the shard, its signature, the manifest"


def test_a_type_of_a_column_that_is_not_there_is_said(tmp_path: Path) -> None:
    write(tmp_path / "in" / "0.jsonl", {"zip": "01234"})
    with pytest.raises(UsageError, match=r"types='zpi': there is no such column, but zip\."):
        prepare(recipe(tmp_path / "out", types=(("zpi", "string"),)), tmp_path / "in")
