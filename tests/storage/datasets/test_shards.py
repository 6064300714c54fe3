"""Shards and their manifest: checked before anybody trains on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.storage.datasets import manifest, shards
from jupyter_llmcloud.storage.datasets.manifest import Manifest, Shard, Tokenizer
from jupyter_llmcloud.storage.datasets.shards import ShardReader, ShardWriter
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer

SCHEMA = pa.schema([("x", pa.int64())])


def make(folder: Path, tokenizer: Tokenizer | None = None) -> Manifest:
    """Three shards of two row groups each, with the numbers from 0 to 29."""
    made = []
    for number in range(3):
        name = f"{number}.parquet"
        with ShardWriter(str(folder / "shards" / name), SCHEMA) as writer:
            for start in (number * 10, number * 10 + 5):
                writer.write({"x": pa.array(range(start, start + 5), pa.int64())})
            size, digest = writer.finish()
        made.append(Shard(name=name, key=str(number), rows=writer.rows, bytes=size, sha256=digest))
    found = Manifest(kind="rows", columns={"x": "int64"}, recipe={}, tokenizer=tokenizer, sources=[], shards=made)
    manifest.write(str(folder), found)
    return found


def test_row_groups_are_read_in_order_over_all_shards(tmp_path: Path) -> None:
    make(tmp_path)
    found = manifest.read(str(tmp_path))
    reader = ShardReader(str(tmp_path), found)
    reader.check()
    assert reader.groups == [5] * 6
    assert [x for group in range(6) for x in reader.read(group).column("x").to_pylist()] == list(range(30))


def _remove(shard: Path) -> None:
    shard.unlink()


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def _flip(shard: Path) -> None:
    """A bit of the values of the first row group."""
    column = parquet.read_metadata(shard).row_group(0).column(0)
    content = bytearray(shard.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"), [(_remove, "lacks 1 of its 3 shards"), (_cut, "changed since"), (_flip, "changed since")]
)
def test_a_shard_that_is_not_what_was_written_is_named(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    found = make(tmp_path)
    damage(tmp_path / "shards" / "1.parquet")
    with pytest.raises(UsageError, match=rf"{told}.*|.*{told}") as refused:
        ShardReader(str(tmp_path), found).check()
    assert "1.parquet" in str(refused.value) and "Prepare the data again" in str(refused.value)


def test_a_damaged_page_of_large_data_is_noticed_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "HASH_ALL_BELOW", 0)
    found = make(tmp_path)
    _flip(tmp_path / "shards" / "1.parquet")
    reader = ShardReader(str(tmp_path), found)
    reader.check()
    assert reader.read(0).num_rows == 5
    with pytest.raises(UsageError, match=r"1.parquet' cannot be read"):
        reader.read(2)


@pytest.mark.parametrize(
    ("write", "error", "told"),
    [
        (lambda at: None, NotFound, "holds no prepared data"),
        (lambda at: at.write_text("{"), UsageError, "cannot be read"),
        (lambda at: at.write_text('{"kind": "rows"}'), UsageError, "missing required field"),
        (
            lambda at: at.write_text(
                '{"version": 9, "kind": "rows", "columns": {}, "recipe": {}, "sources": [], "shards": []}'
            ),
            UsageError,
            "is of version 9",
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_said(
    tmp_path: Path, write: Callable[[Path], Any], error: type[LLMCloudError], told: str
) -> None:
    write(tmp_path / "manifest.json")
    with pytest.raises(error, match=told):
        manifest.read(str(tmp_path))


def test_another_tokenizer_than_that_of_the_tokens_is_refused(tmp_path: Path) -> None:
    kept, _ = pack_tokenizer(lambda text: [1])
    other, _ = pack_tokenizer(lambda text: [2])
    found = make(tmp_path, kept)
    found.check_tokenizer(kept.fingerprint, str(tmp_path))
    with pytest.raises(UsageError, match="were made by another tokenizer"):
        found.check_tokenizer(other.fingerprint, str(tmp_path))


def test_a_tokenizer_is_known_by_its_definition_not_by_how_it_came(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    fast = Fast(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    fast.save(str(tmp_path / "tokenizer.json"))
    by_object, _ = pack_tokenizer(fast)
    fast.enable_truncation(4)
    assert pack_tokenizer(str(tmp_path))[0].fingerprint == by_object.fingerprint == pack_tokenizer(fast)[0].fingerprint
    assert (by_object.eos, by_object.vocab_size) == (1, 2)


@pytest.mark.parametrize("tokenizer", [7, "no/such/folder-or-name"])
def test_what_is_no_tokenizer_is_refused(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"is none|cannot be had"):
        pack_tokenizer(tokenizer)


def test_a_writer_that_does_not_finish_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(ZeroDivisionError), ShardWriter(str(tmp_path / "shards" / "a.parquet"), SCHEMA) as writer:
        writer.write({"x": pa.array(range(9000), pa.int64())})
        assert not list((tmp_path / "temporary").iterdir()), "nothing is left of who is killed here"
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        ShardWriter(str(tmp_path / "shards" / "a.parquet"), "no schema")
    assert not (tmp_path / "shards").exists() and not list((tmp_path / "temporary").iterdir())
