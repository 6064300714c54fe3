"""What is done with one partition: read, cleaned, tokenized, packed, written; and what is said of a source that is bad."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from jupyter_llmcloud.cluster.data import planning
from jupyter_llmcloud.cluster.data.duplicates import to_drop
from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.cluster.data.tokens import Packer
from jupyter_llmcloud.cluster.data.work import PartitionWork
from jupyter_llmcloud.core.data.partitions import Partition
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.storage.datasets.manifest import CleaningStep, Shard, Tokenizer
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer

LINES = [f"line {number} says {'é' * (number % 7)} this" for number in range(500)]


def letters(text: str) -> list[int]:
    """A tokenizer: the code of each letter."""
    return [ord(letter) for letter in text]


def recipe(out: Path | str, *steps: str, seq_len: int | None = None, **options: Any) -> Recipe:
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
    table: pa.Table = parquet.read_table(Path(made.out) / "shards" / shard.name)
    rows: list[dict[str, Any]] = table.to_pylist()
    assert len(rows) == shard.num_rows
    return rows


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


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.with_suffix(".jsonl")


def _csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [f'{row["number"]},"{row["text"]}"' for row in rows]
    path.with_suffix(".csv").write_text("number,text\n" + "\n".join(lines) + "\n")
    return path.with_suffix(".csv")


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"), row_group_size=7)
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("write", [_jsonl, _csv, _parquet])
def test_rows_keep_their_columns_in_every_format(tmp_path: Path, write: Callable[..., Path]) -> None:
    rows = [{"number": number, "text": f"one, two\n{number}"} for number in range(40)]
    source = write(tmp_path / "a", rows)
    assert prepared(recipe(tmp_path / "out"), source, partition_bytes=300) == rows


def test_tokens_are_packed_in_order_with_the_end_of_each_document_and_the_last_row_filled_up(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "a", [{"text": "abc"}, {"text": "de"}, {"text": "fghi"}])
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


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_steps_clean_and_drop_in_order(tmp_path: Path) -> None:
    texts = ["<p>Hello   &amp; see https://a.b/c</p>", "<p>x</p>", "\uff21\uff22\uff23 means ABC"]
    source = _jsonl(tmp_path / "a", [{"text": text} for text in texts])
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
        _jsonl(tmp_path / f"in-{number}", [{"text": text} for text in texts])
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
        _jsonl(tmp_path / f"{number}", [{"x": x, "y": None} for x in values[number * 100 : number * 100 + 100]])
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
    return _jsonl(folder / "a", [{"body": "x"}])


def _ragged_csv(folder: Path) -> Path:
    (folder / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    return folder / "a.csv"


def _no_image(folder: Path) -> Path:
    (folder / "a.png").write_text("no image")
    return folder / "a.png"


def _mixed(folder: Path) -> Path:
    return _jsonl(folder / "a", [{"x": 1}, {"x": "one"}])


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
    source = _jsonl(tmp_path / "a", [{"text": "seven"}])
    own = pickle.dumps({"steps": {"len": len}})
    made = replace(recipe(tmp_path / "out"), steps=(CleaningStep(name="len", source_hash="x"),), own=own)
    with pytest.raises(UsageError, match="the step 'len' gave 1: on rows a step gives the row"):
        prepared(made, source)


def test_partitions_are_plain_values() -> None:
    part = Partition.restore({"pieces": [{"url": "a", "start": 0, "end": 3}], "key": "k", "num_bytes": 3})
    assert Partition.restore(part.as_dict()) == part


# --- data of other people -------------------------------------------------------------------------------------------


def test_what_would_be_cut_off_in_a_column_is_refused_with_the_way_out(tmp_path: Path) -> None:
    rows = [{"x": number} for number in range(20)]
    late = _jsonl(tmp_path / "late", [*rows, {"x": 1.5}])
    with pytest.raises(UsageError, match=r"'x' is int64 in the first rows .* 1.5.*types='x=float64'"):
        _write_with_schema_of(_jsonl(tmp_path / "a", rows), late, recipe(tmp_path / "out"))
    assert prepared(recipe(tmp_path / "all", types=(("x", "float64"),)), late)[-2:] == [{"x": 19.0}, {"x": 1.5}]


def test_a_field_of_a_nested_column_that_comes_later_is_refused_not_left_out(tmp_path: Path) -> None:
    first = _jsonl(tmp_path / "a", [{"m": [{"a": 1}]}])
    with pytest.raises(UsageError, match="'b' would be lost"):
        _write_with_schema_of(first, _jsonl(tmp_path / "b", [{"m": [{"a": 1, "b": 2}]}]), recipe(tmp_path / "out"))


def _write_with_schema_of(first: Path, source: Path, made: Recipe) -> Shard:
    """The shard of a source whose columns were told by another file."""
    told = planning.plan(made, [str(first)], 1 << 20)
    plan = planning.plan(made, [str(source)], 1 << 20)
    schema = PartitionWork(told.recipe).sample(told.partitions[0])
    return PartitionWork(plan.recipe).shard(plan.partitions[0], schema, ([], []), {}, None)


def test_numbers_that_are_whole_only_at_first_are_seen_before_anything_is_written(tmp_path: Path) -> None:
    rows = [{"x": number, "m": {"a": 1}} for number in range(5000)]
    source = _jsonl(tmp_path / "a", [*rows, {"x": 0.5, "m": {"a": 1, "b": "late"}}])
    assert prepared(recipe(tmp_path / "out"), source)[-1] == {"x": 0.5, "m": {"a": 1, "b": "late"}}


def test_columns_of_parquet_keep_the_types_that_they_have_there(tmp_path: Path) -> None:
    columns = {
        "f": pa.array([0.1, None], pa.float32()),
        "at": pa.array([1, 2], pa.timestamp("ns")),
        "tags": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "price": pa.array([1, 200], pa.decimal128(10, 2)),
    }
    source = tmp_path / "a.parquet"
    parquet.write_table(pa.table(columns), source)
    made = recipe(tmp_path / "out")
    rows = prepared(made, source)
    written = parquet.read_schema(next((tmp_path / "out" / "shards").iterdir()))
    assert rows == pa.table(columns).to_pylist()
    assert {column.name: column.type for column in written} == {name: array.type for name, array in columns.items()}


def test_parquet_with_large_numbers_and_with_categories_in_a_struct_is_read(tmp_path: Path) -> None:
    words = pa.array(["a", "b", None, "a"]).dictionary_encode()
    hashes = pa.array([2**64 - 1, 0, None, 1], pa.uint64())
    columns = {
        "hash": hashes,
        "hashes": pa.array([[2**64 - 1], [0], None, []], pa.list_(pa.uint64())),
        "both": pa.StructArray.from_arrays([hashes, words], ["hash", "word"]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)
    assert prepared(recipe(tmp_path / "out"), tmp_path / "a.parquet") == pa.table(columns).to_pylist()


def test_a_number_of_json_that_no_type_holds_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'x' holds whole numbers beyond 2\*\*63"):
        prepared(recipe(tmp_path / "out"), _jsonl(tmp_path / "a", [{"x": 2**64 - 1}]))


ARRAY = '[\n  {"text": "a", "x": NaN},\n  {"text": "b", "x": 1.0}\n]\n'


@pytest.mark.parametrize("begin", ["", "\ufeff"])
def test_json_is_read_as_python_and_windows_write_it(tmp_path: Path, begin: str) -> None:
    (tmp_path / "array.json").write_text(begin + ARRAY, encoding="utf-8")
    (tmp_path / "lines.jsonl").write_bytes((begin + '{"text": "a", "x": NaN}\r\n{"text": "b", "x": 1.0}\r\n').encode())
    for name in ("array.json", "lines.jsonl"):
        for cut in (1 << 20, 20):
            rows = prepared(recipe(tmp_path / f"{name}{cut}"), tmp_path / name, partition_bytes=cut)
            assert [row["text"] for row in rows] == ["a", "b"] and rows[0]["x"] != rows[0]["x"]


def test_half_a_character_in_json_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}\n')
    with pytest.raises(UsageError, match="half a character"):
        prepared(recipe(tmp_path / "out"), tmp_path / "a.jsonl")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_other_encodings_are_read_when_they_are_told_and_refused_when_not(tmp_path: Path, encoding: str) -> None:
    texts = ["été", "naïve"]
    csv_file, lines = tmp_path / "a.csv", tmp_path / "a.txt"
    csv_file.write_text("text\r\n" + "\r\n".join(texts) + "\r\n", encoding=encoding, newline="")
    lines.write_text("\n".join(texts) + "\n", encoding=encoding)
    for source in (csv_file, lines):
        made = recipe(tmp_path / f"out-{source.suffix}", encoding=encoding)
        assert [row["text"] for row in prepared(made, source, partition_bytes=4)] == texts
        with pytest.raises(UsageError, match="encoding="):
            prepared(recipe(tmp_path / "not"), source)


@pytest.mark.parametrize("mark", [";", "\t", "|", ","])
def test_csv_is_cut_by_what_stands_in_its_first_row(tmp_path: Path, mark: str) -> None:
    (tmp_path / "a.csv").write_text(f'\ufeffid{mark}text\n1{mark}"two, {mark}\nlines ""q"""\n', encoding="utf-8")
    assert prepared(recipe(tmp_path / "out"), tmp_path / "a.csv") == [{"id": 1, "text": f'two, {mark}\nlines "q"'}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,a\n1,2\n", "two columns called 'a'"),
        ("a\n" + "1\n" * (3 << 20) + "x1\n", r"'a' is int64 in its first 4 MiB, and later there is 'x1'. .*types="),
    ],
    ids=["twice", "later"],
)
def test_csv_that_would_lose_something_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UsageError, match=told):
        prepared(recipe(tmp_path / "out"), tmp_path / "a.csv", partition_bytes=1 << 30)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("name;price, EUR;qty\nx;1,5;3\n", {"name": "x", "price, EUR": "1,5", "qty": 3}),
        ('"Name, Vorname";Alter\n"Meier, Hans";5\n', {"Name, Vorname": "Meier, Hans", "Alter": 5}),
        ("question,option A|B|C\nx,y\n", {"question": "x", "option A|B|C": "y"}),
    ],
    ids=["decimal-comma", "quoted", "other-marks"],
)
def test_what_stands_between_columns_is_what_all_of_the_first_rows_have(
    tmp_path: Path, text: str, row: dict[str, Any]
) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert prepared(recipe(tmp_path / "out"), tmp_path / "a.csv") == [row]


@pytest.mark.parametrize("other", ["2.5", "18446744073709551614"])
def test_a_whole_number_that_a_fraction_cannot_hold_is_refused(tmp_path: Path, other: str) -> None:
    (tmp_path / "a.csv").write_text(f"id\n9007199254740993\n{other}\n")
    with pytest.raises(
        UsageError, match=r"'id' is float64, which would make 9007199254740992.0 of 9007199254740993.*'id=string'"
    ):
        prepared(recipe(tmp_path / "out"), tmp_path / "a.csv")
    told = recipe(tmp_path / "told", types=(("id", "string"),))
    assert [row["id"] for row in prepared(told, tmp_path / "a.csv")] == ["9007199254740993", other]
    (tmp_path / "b.csv").write_text("x\n1e300\n9007199254740994\n2.5\n")
    assert [row["x"] for row in prepared(recipe(tmp_path / "b"), tmp_path / "b.csv")] == [
        1e300,
        9007199254740994.0,
        2.5,
    ]


def test_a_column_of_csv_is_what_it_is_told_to_be(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("zip,n\n01234,1\n")
    made = recipe(tmp_path / "out", types=(("zip", "string"), ("n", "float32")))
    assert prepared(made, tmp_path / "a.csv") == [{"zip": "01234", "n": 1.0}]


def _zstd(parts: list[bytes]) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


def _gzip(parts: list[bytes]) -> bytes:
    return b"".join(map(gzip.compress, parts))


@pytest.mark.parametrize(("ending", "pack"), [("gz", _gzip), ("zst", _zstd)])
def test_a_compressed_file_is_read_to_its_real_end_and_one_that_is_cut_off_is_named(
    tmp_path: Path, ending: str, pack: Callable[[list[bytes]], bytes]
) -> None:
    source = tmp_path / f"a.txt.{ending}"
    packed = pack([b"one\n" * 3000, b"two\n"])
    source.write_bytes(packed)
    assert [row["text"] for row in prepared(recipe(tmp_path / "out"), source)] == ["one"] * 3000 + ["two"]
    source.write_bytes(packed[:-5])
    with pytest.raises(UsageError, match=rf"a.txt.{ending}' is cut off or damaged"):
        prepared(recipe(tmp_path / "cut"), source)
    source.write_bytes(b"no such thing")
    with pytest.raises(UsageError, match=r"or is no .* file"):
        prepared(recipe(tmp_path / "no"), source)


def test_images_of_16_bits_are_brought_to_8_and_those_without_a_range_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    ramp = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    (tmp_path / "in").mkdir()
    Image.fromarray(ramp).save(tmp_path / "in" / "a.png")
    (row,) = prepared(recipe(tmp_path / "out", image_size=4), tmp_path / "in")
    pixels = np.frombuffer(row["image"], np.uint8).reshape(4, 4, 3)
    assert (pixels == (ramp // 257).astype(np.uint8)[..., None]).all()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "in" / "b.tif")
    for size in (4, None):
        with pytest.raises(UsageError, match=r"b.tif'.*floating-point numbers, whose range is not known"):
            prepared(recipe(tmp_path / f"out-{size}", image_size=size), tmp_path / "in")


def test_an_image_that_is_cut_off_is_named_also_where_it_keeps_its_size(tmp_path: Path) -> None:
    from PIL import Image

    Image.effect_noise((64, 64), 90).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1500])
    with pytest.raises(UsageError, match=r"a.jpg'.*cannot be read as an image"):
        prepared(recipe(tmp_path / "out"), tmp_path / "a.jpg")


def test_a_partition_that_two_processes_carry_out_at_once_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = tmp_path / "a.txt", recipe(tmp_path / "out", seq_len=16)
    source.write_text("\n".join(LINES))
    put_file = LocalFileSystem.put_file

    def put_file_while_another_puts_the_same(fs: LocalFileSystem, local: str, path: str, **options: Any) -> None:
        put_file(fs, local, path, **options)
        monkeypatch.undo()
        prepared(made, source)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file_while_another_puts_the_same)
    rows = prepared(made, source)
    assert "".join(chr(token) for row in rows for token in row["input_ids"][: row["length"]]) == "".join(LINES)
    assert not list(tmp_path.rglob("*.part"))
