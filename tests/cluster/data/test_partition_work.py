"""What is done with one partition: read, cleaned, tokenized, packed, written; and what is said of a source that is bad."""

from __future__ import annotations

import gzip
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jupyter_llmcloud.cluster.data import planning
from jupyter_llmcloud.cluster.data.duplicates import to_drop
from jupyter_llmcloud.cluster.data.tokens import Packer
from jupyter_llmcloud.cluster.data.work import PartitionWork
from jupyter_llmcloud.core.data.partitions import Partition
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.storage.datasets import filesystem
from jupyter_llmcloud.storage.datasets.manifest import CleaningStep, Tokenizer
from tests.support.prepared_data import prepared, recipe, rows_of, write_csv, write_jsonl, write_parquet

LINES = [f"line {number} says {'é' * (number % 7)} this" for number in range(500)]


def test_a_text_file_that_is_cut_anywhere_gives_the_lines_of_the_whole(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(LINES))
    for partition_bytes in (1024, 1999, 4096):
        out = tmp_path / str(partition_bytes)
        assert [row["text"] for row in prepared(recipe(out), source, partition_bytes=partition_bytes)] == LINES


def test_a_compressed_file_gives_the_lines_of_the_plain_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(LINES).encode()))
    rows = prepared(recipe(tmp_path / "out"), tmp_path / "a.txt.gz", partition_bytes=100)
    assert [row["text"] for row in rows] == LINES


@pytest.mark.parametrize(("unit", "texts"), [("paragraph", ["a\nb", "c"]), ("file", ["a\nb\n\n\nc"])])
def test_a_document_can_be_a_paragraph_or_a_file(tmp_path: Path, unit: str, texts: list[str]) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n\n\nc\n")
    assert [row["text"] for row in prepared(recipe(tmp_path / "out", unit=unit), tmp_path / "a.txt")] == texts


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_rows_keep_their_columns_in_every_format(tmp_path: Path, write: Callable[..., Path]) -> None:
    rows = [{"number": number, "text": f"one, two\n{number}"} for number in range(40)]
    source = write(tmp_path / "a", rows)
    assert prepared(recipe(tmp_path / "out"), source, partition_bytes=300) == rows


def test_tokens_are_packed_in_order_with_the_end_of_each_document_and_the_last_row_filled_up(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a", [{"text": "abc"}, {"text": "de"}, {"text": "fghi"}])
    made = recipe(tmp_path / "out", seq_len=5)
    assert made.tokenizer is not None
    made = replace(made, tokenizer=type(made.tokenizer)(**{**_fields(made.tokenizer), "eos": 1, "pad": 2}))
    rows = prepared(made, source)
    stream = [*map(ord, "abc"), 1, *map(ord, "de"), 1, *map(ord, "fghi"), 1]
    assert [token for row in rows for token in row["input_ids"]] == [*stream, 2, 2, 2]
    assert [row["length"] for row in rows] == [5, 5, 2]


@pytest.mark.parametrize(("ids", "named"), [([5, -3, 9], -3), ([5, 100], 100), ([-1, 200], -1)])
def test_an_id_outside_the_vocabulary_is_named(ids: list[int], named: int) -> None:
    packer = Packer(Tokenizer(name="mine", vocab_size=100, fingerprint="f"), 4)
    with pytest.raises(UsageError, match=f"gave the id {named}, outside its vocabulary of 100"):
        packer.add([ids])


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([1, 1.5], "gave 1.5, which is no token id"),
        ("12", "gave '1', which is no token id"),
        ({"input_ids": [1]}, "gave 'input_ids', which is no token id"),
        ([[1, 2]], r"gave \[1, 2\], which is no token id"),
        (None, "no list of token ids: .*NoneType"),
    ],
    ids=["fraction", "text", "mapping", "nested", "none"],
)
def test_what_is_no_token_id_is_said(ids: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Packer(Tokenizer(name="mine", vocab_size=100, fingerprint="f"), 4).add([ids])


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_steps_clean_and_drop_in_order(tmp_path: Path) -> None:
    texts = ["<p>Hello   &amp; see https://a.b/c</p>", "<p>x</p>", "\uff21\uff22\uff23 means ABC"]
    source = write_jsonl(tmp_path / "a", [{"text": text} for text in texts])
    rows = prepared(recipe(tmp_path / "out", "html", "urls", "nfkc", "whitespace", "drop-short:5"), source)
    assert [row["text"] for row in rows] == ["Hello & see", "ABC means ABC"]


def test_images_of_folders_get_a_size_and_a_label(tmp_path: Path) -> None:
    from PIL import Image

    for name, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (20, 10), color).save(tmp_path / "in" / name / "a.png")
    rows = prepared(recipe(tmp_path / "out", image_size=4), tmp_path / "in")
    assert [row["label"] for row in rows] == [0, 1]
    assert np.frombuffer(rows[1]["image"], np.uint8).reshape(4, 4, 3)[2, 2].tolist() == [0, 0, 255]


class StandInHDFS(MemoryFileSystem):
    """Answers for hdfs://, as the one of Arrow would where there is a cluster of Hadoop."""

    protocol = "hdfs"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hdfs://").strip("/")


@pytest.mark.parametrize("scheme", ["memory", "hdfs"])
def test_any_filesystem_of_fsspec_is_read_and_written(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its paths are none of this machine's."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hdfs", StandInHDFS)
    files = fsspec.filesystem(scheme)
    files.pipe_file("/in/a.txt", "\n".join(LINES).encode())
    made = recipe(f"{scheme}://out", seq_len=8)
    plan = planning.plan(made, [f"{scheme}://in/*.txt"], 2000)
    assert all(piece.url.startswith(f"{scheme}://") for part in plan.partitions for piece in part.pieces)
    shards = [PartitionWork(plan.recipe).shard(part, b"", ([], []), {}, None) for part in plan.partitions]
    assert len(shards) > 3
    assert {f"{shard.name}" for shard in shards} == {Path(name).name for name in files.ls("/out/shards", detail=False)}
    files.rm("/out", recursive=True)
    files.rm("/in", recursive=True)


# --- duplicates -----------------------------------------------------------------------------------------------------


def dropped(tmp_path: Path, dedup: str, files: list[list[str]], threshold: float = 0.7) -> list[str]:
    """What is left of texts."""
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / f"in-{number}", [{"text": text} for text in texts])
    made = recipe(tmp_path / "out", dedup=dedup, threshold=threshold)
    plan = planning.plan(made, [str(tmp_path / "in-*.jsonl")], 1500)
    assert len(plan.partitions) == len(files)
    work = PartitionWork(plan.recipe)
    first = [work.first_pass(part) for part in plan.partitions]
    pairs = [work.pairs([found.key for found in first], range(at, at + 16)) for at in range(0, 64, 16)]
    drop = to_drop([p for found, _ in pairs for p in found], [p for _, found in pairs for p in found])
    schema = work.sample(plan.partitions[0])
    kept = []
    for number, part in enumerate(plan.partitions):
        shard = work.shard(part, schema, drop.get(number, ([], [])), {}, first[number])
        kept += [row["text"] for row in rows_of(made, shard)]
    return kept


def words(start: int, num: int = 60) -> str:
    return " ".join(f"word{number}" for number in range(start, start + num))


def test_of_equal_documents_the_first_stays(tmp_path: Path) -> None:
    a, b, c = (words(100 * n) for n in range(3))
    assert dropped(tmp_path, "exact", [[a, b, a], [b, c, f"{a} more"]]) == [a, b, c, f"{a} more"]


def test_of_documents_that_are_alike_the_first_stays_and_those_that_are_not_all_do(tmp_path: Path) -> None:
    a, b = words(0), words(1000)
    half = f"{words(0, 30)} {words(5000, 30)}"  # shares a third of the five-word runs of both
    assert dropped(tmp_path, "near", [[a, b, half], [f"{a} end", f"{b} end", f"{a} end"]]) == [a, b, half]


def test_a_partition_that_is_written_keeps_what_it_has() -> None:
    pairs = [(0, 0, 1, 0), (1, 0, 2, 0), (2, 0, 2, 3)]
    assert to_drop(pairs, [], settled=2) == {2: ([0, 3], [])}
    assert to_drop(pairs, [], settled=0) == {1: ([0], []), 2: ([0, 3], [])}


# --- columns of numbers ---------------------------------------------------------------------------------------------


def test_columns_are_normalised_over_all_partitions(tmp_path: Path) -> None:
    from jupyter_llmcloud.cluster.data import features

    values = np.random.default_rng(0).normal(50, 9, 300)
    for number in range(3):
        write_jsonl(tmp_path / f"{number}", [{"x": x, "y": None} for x in values[number * 100 : number * 100 + 100]])
    made = recipe(tmp_path / "out", normalize=("x",))
    plan = planning.plan(made, [str(tmp_path)], 1024, False)
    work = PartitionWork(plan.recipe)
    first = [work.first_pass(part) for part in plan.partitions]
    known = features.statistics(features.together(found.moments for found in first))
    assert known["x"] == pytest.approx([values.mean(), values.std()])
    schema = work.sample(plan.partitions[0])
    shards = [
        work.shard(part, schema, ([], []), known, done) for part, done in zip(plan.partitions, first, strict=True)
    ]
    found = np.array([row["x"] for shard in shards for row in rows_of(made, shard)])
    assert found == pytest.approx((values - values.mean()) / values.std(), abs=1e-5)


@pytest.mark.parametrize("value", [0.1, -1e9, 0.0, 7.0])
def test_a_column_that_is_always_the_same_is_only_shifted_also_where_its_mean_is_rounded(value: float) -> None:
    from jupyter_llmcloud.cluster.data import features

    parts = [features.moments([{"x": value}] * number, ["x"]) for number in (10, 7, 2048, 3)]
    known = features.statistics(features.together(parts))
    assert known["x"][1] == 1.0
    assert features.normalized({"x": value}, known)["x"] == pytest.approx(0.0, abs=1e-6)
    close = [{"x": 1.7e9 + number} for number in range(100)]
    assert features.statistics(features.moments(close, ["x"]))["x"][1] == pytest.approx(28.866, abs=0.01)


@pytest.mark.parametrize("value", [1e200, 1.7e308, 10**400], ids=["squares", "sums", "no-float"])
def test_numbers_too_large_to_be_normalised_are_named(value: float) -> None:
    from jupyter_llmcloud.cluster.data import features

    with pytest.raises(UsageError, match=r"normalize='x': the column holds .* too large"):
        features.statistics(features.moments([{"x": value}, {"x": -value}, {"x": value}], ["x"]))


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_a_source_that_is_half_binary_is_named_with_the_place_or_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\xfe\nalso good\nzero \x00 byte\n")
    with pytest.raises(UsageError, match=r"a.txt': byte 9 is no UTF-8 text .*bad_rows='skip'"):
        prepared(recipe(tmp_path / "out"), tmp_path / "a.txt")
    made = recipe(tmp_path / "out", skip_bad=True)
    plan = planning.plan(made, [str(tmp_path / "a.txt")], 1 << 20)
    work = PartitionWork(plan.recipe)
    shard = work.shard(plan.partitions[0], work.sample(plan.partitions[0]), ([], []), {}, None)
    assert ([row["text"] for row in rows_of(made, shard)], shard.bad) == (["good", "also good"], 2)


def _broken_json(folder: Path) -> Path:
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": \n')
    return folder / "a.jsonl"


def _broken_parquet(folder: Path) -> Path:
    (folder / "a.parquet").write_bytes(b"PAR1 no more")
    return folder / "a.parquet"


def _no_text(folder: Path) -> Path:
    return write_jsonl(folder / "a", [{"body": "x"}])


def _ragged_csv(folder: Path) -> Path:
    (folder / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    return folder / "a.csv"


def _no_image(folder: Path) -> Path:
    (folder / "a.png").write_text("no image")
    return folder / "a.png"


def _mixed(folder: Path) -> Path:
    return write_jsonl(folder / "a", [{"x": 1}, {"x": "one"}])


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (_broken_json, "a line is no JSON"),
        (_broken_parquet, "cannot be read as Parquet"),
        (_ragged_csv, "is not read as CSV"),
        (_no_image, "cannot be read as an image"),
        (_mixed, "holds values of several types"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, write: Callable[[Path], Path], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        prepared(recipe(tmp_path / "out"), write(tmp_path))


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no text in the column 'text', but None \(columns: body\)"):
        prepared(recipe(tmp_path / "out", seq_len=4), _no_text(tmp_path))


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda folder: None, NotFound, "is not there"),
        (lambda folder: (folder / "in").mkdir(), NotFound, "folder without files"),
        (lambda folder: ((folder / "in").mkdir(), (folder / "in/a.txt").touch()), UsageError, "the source is empty"),
        (
            lambda folder: (
                (folder / "in").mkdir(),
                *((folder / "in" / n).write_text("x") for n in ("a.txt", "b.csv")),
            ),
            UsageError,
            "there is csv and text",
        ),
    ],
)
def test_a_source_that_holds_nothing_or_too_much_is_refused_before_anything_is_done(
    tmp_path: Path, make: Callable[[Path], Any], error: type[LLMCloudError], told: str
) -> None:
    make(tmp_path)
    with pytest.raises(error, match=told):
        planning.plan(recipe(tmp_path / "out"), [str(tmp_path / "in")], 1 << 20)
    assert not (tmp_path / "out").exists()


def test_a_file_or_folder_is_found_by_its_name_also_where_that_looks_like_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "run [v2] 100% *"
    folder.mkdir()
    (folder / "a[1].txt").write_text("one\n")
    (tmp_path / "a1.txt").write_text("another\n")
    for number, source in enumerate((folder, folder / "a[1].txt")):
        assert [row["text"] for row in prepared(recipe(tmp_path / f"out-{number}"), source)] == ["one"]
    assert [row["text"] for row in prepared(recipe(tmp_path / "out"), tmp_path / "a[0-9].txt")] == ["another"]


def test_a_url_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        planning.plan(recipe(tmp_path / "out"), ["nowhere://a/b.txt"], 1 << 20)


def test_a_step_that_fails_is_named_with_what_it_failed_on(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a", [{"text": "seven"}])
    own = pickle.dumps({"steps": {"len": len}})
    made = replace(recipe(tmp_path / "out"), steps=(CleaningStep(name="len", source_hash="x"),), own=own)
    with pytest.raises(UsageError, match="the step 'len' gave 1: on rows a step gives the row"):
        prepared(made, source)


def test_partitions_are_plain_values() -> None:
    part = Partition.restore({"pieces": [{"url": "a", "start": 0, "end": 3}], "key": "k", "num_bytes": 3})
    assert Partition.restore(part.as_dict()) == part


def test_a_partition_that_two_processes_carry_out_at_once_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = tmp_path / "a.txt", recipe(tmp_path / "out", seq_len=16)
    source.write_text("\n".join(LINES))
    move = filesystem._move

    def move_while_another_puts_the_same(fs: Any, staged: str, path: str) -> None:
        monkeypatch.undo()
        prepared(made, source)
        move(fs, staged, path)

    monkeypatch.setattr(filesystem, "_move", move_while_another_puts_the_same)
    rows = prepared(made, source)
    assert "".join(chr(token) for row in rows for token in row["input_ids"][: row["length"]]) == "".join(LINES)
    assert not list(tmp_path.rglob("*.part"))
