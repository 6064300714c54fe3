"""Sources as other people have them: nothing of them is lost in silence, and what cannot be read is named."""

from __future__ import annotations

import gzip
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from jupyter_llmcloud.cluster.data import planning
from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.cluster.data.work import PartitionWork
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets import filesystem
from jupyter_llmcloud.storage.datasets.manifest import Shard
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer
from tests.support.prepared_data import prepared, recipe, write_jsonl, write_parquet


def test_what_would_be_cut_off_in_a_column_is_refused_with_the_way_out(tmp_path: Path) -> None:
    rows = [{"x": number} for number in range(20)]
    late = write_jsonl(tmp_path / "late", [*rows, {"x": 1.5}])
    with pytest.raises(UsageError, match=r"'x' is int64 in the first rows .* 1.5.*types='x=float64'"):
        _write_with_schema_of(write_jsonl(tmp_path / "a", rows), late, recipe(tmp_path / "out"))
    assert prepared(recipe(tmp_path / "all", types=(("x", "float64"),)), late)[-2:] == [{"x": 19.0}, {"x": 1.5}]


def test_a_field_of_a_nested_column_that_comes_later_is_refused_not_left_out(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a", [{"m": [{"a": 1}]}])
    with pytest.raises(UsageError, match="'b' would be lost"):
        _write_with_schema_of(first, write_jsonl(tmp_path / "b", [{"m": [{"a": 1, "b": 2}]}]), recipe(tmp_path / "out"))


def _write_with_schema_of(first: Path, source: Path, made: Recipe) -> Shard:
    """The shard of a source whose columns were told by another file."""
    told = planning.plan(made, [str(first)], 1 << 20)
    plan = planning.plan(made, [str(source)], 1 << 20)
    schema = PartitionWork(told.recipe).sample(told.partitions[0])
    return PartitionWork(plan.recipe).shard(plan.partitions[0], schema, ([], []), {}, None)


def test_numbers_that_are_whole_only_at_first_are_seen_before_anything_is_written(tmp_path: Path) -> None:
    rows = [{"x": number, "m": {"a": 1}} for number in range(5000)]
    source = write_jsonl(tmp_path / "a", [*rows, {"x": 0.5, "m": {"a": 1, "b": "late"}}])
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
        prepared(recipe(tmp_path / "out"), write_jsonl(tmp_path / "a", [{"x": 2**64 - 1}]))


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


@pytest.mark.parametrize("dedup", ["none", "near"])
def test_nothing_is_left_in_the_temporary_folder_whenever_a_worker_is_killed(
    tmp_path: Path, dedup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Path] = []
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    move = filesystem._move

    def look(fs: Any, staged: str, path: str) -> None:
        left.extend(temporary.iterdir())
        move(fs, staged, path)

    monkeypatch.setattr(filesystem, "_move", look)
    source, made = write_jsonl(tmp_path / "a", [{"text": "one"}]), recipe(tmp_path / "out", dedup=dedup)
    plan = planning.plan(made, [str(source)], 1 << 20)
    work = PartitionWork(plan.recipe)
    first = work.first_pass(plan.partitions[0]) if plan.recipe.has_first_pass else None
    work.shard(plan.partitions[0], work.sample(plan.partitions[0]), ([], []), {}, first)
    assert not left and not list(temporary.iterdir())


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array(["a"])], ["x", "x", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="two columns called 'x'"):
        prepared(recipe(tmp_path / "out"), tmp_path / "a.parquet")
    assert prepared(recipe(tmp_path / "tokens", seq_len=1), tmp_path / "a.parquet") == [
        {"input_ids": [97], "length": 1}
    ]


@pytest.mark.parametrize("out", ["in/out", "in"])
def test_what_was_prepared_is_no_source_of_the_next_preparation_also_where_it_lies_below_the_source(
    tmp_path: Path, out: str
) -> None:
    write_parquet(tmp_path / "a", [{"x": 1}]).rename((tmp_path / "in").mkdir() or tmp_path / "in" / "a.parquet")  # type: ignore[func-returns-value]
    made = recipe(tmp_path / out)
    assert prepared(made, tmp_path / "in") == [{"x": 1}]
    (tmp_path / out / "manifest.json").write_text("{}")
    again = planning.plan(made, [str(tmp_path / "in")], 1 << 20, overwrite=True)
    assert [piece.url for part in again.partitions for piece in part.pieces] == [str(tmp_path / "in" / "a.parquet")]
    with pytest.raises(UsageError, match="is where the prepared data itself is written"):
        planning.plan(made, [str(tmp_path / out / "shards")], 1 << 20, overwrite=True)


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    picture.save(tmp_path / "a.png", exif=exif)
    (row,) = prepared(recipe(tmp_path / "out", image_size=2), tmp_path / "a.png")
    pixels = np.frombuffer(row["image"], np.uint8).reshape(2, 2, 3)
    assert pixels.tolist() == [[[0, 0, 255], [255, 0, 0]], [[9, 9, 9], [0, 255, 0]]]


class Letters:
    """A tokenizer of one's own, with more than is asked of it."""

    def encode(self, text: str) -> list[str]:
        return [*text]

    def __call__(self, text: str) -> list[int]:
        return [ord(letter) for letter in self.encode(text)]


def test_a_tokenizer_of_ones_own_is_called_also_where_it_has_an_encode_of_its_own(tmp_path: Path) -> None:
    told, packed = pack_tokenizer(Letters())
    made = recipe(tmp_path / "out", tokenizer=told, own=pickle.dumps({"tokenizer": packed}))
    rows = prepared(replace(made, seq_len=2), write_jsonl(tmp_path / "a", [{"text": "ab"}]))
    assert rows == [{"input_ids": [97, 98], "length": 2}]


def test_a_type_that_is_told_holds_for_files_that_have_another_one(tmp_path: Path) -> None:
    for name, column in (("a", pa.array(["x"]).dictionary_encode()), ("b", pa.array(["y"]))):
        parquet.write_table(pa.table({"kind": column}), tmp_path / f"{name}.parquet")
    with pytest.raises(UsageError, match=r"do not have the same columns.*types='zip=string'"):
        prepared(recipe(tmp_path / "out"), tmp_path / "a.parquet", tmp_path / "b.parquet")
    made = recipe(tmp_path / "told", types=(("kind", "string"),))
    rows = prepared(made, tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert rows == [{"kind": "x"}, {"kind": "y"}]


def test_an_array_without_rows_and_a_damaged_file_that_is_left_out_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]\n")
    (tmp_path / "b.json").write_text('[{"x": 1}]')
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'{"x": 2}\n' * 1000)[:-9])
    files = [tmp_path / name for name in ("a.json", "b.json", "c.json.gz")]
    assert prepared(recipe(tmp_path / "out", skip_bad=True), *files) == [{"x": 1}]
    with pytest.raises(UsageError, match=r"c\.json\.gz' is cut off or damaged"):
        prepared(recipe(tmp_path / "not"), *files)
