"""How a source is cut: the same for the same files, no byte twice, none left out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.core.data.partitions import WHOLE, SourceFile, cut, format_of
from jupyter_llmcloud.core.data.spec import PrepareSpec
from jupyter_llmcloud.core.data.step_names import check_step, parse_steps
from jupyter_llmcloud.errors import UsageError

files = st.lists(st.integers(1, 500), min_size=1, max_size=20).map(
    lambda sizes: [SourceFile(f"/data/{number:02}.txt", size) for number, size in enumerate(sizes)]
)


@settings(max_examples=40)
@given(files, st.integers(1, 300))
def test_every_byte_is_in_one_piece(found: list[SourceFile], partition_bytes: int) -> None:
    pieces = [piece for partition in cut(found, "text", partition_bytes) for piece in partition.pieces]
    for file in found:
        bounds = [(p.start, p.end) for p in pieces if p.url == file.url]
        if bounds == [(0, WHOLE)]:
            continue
        assert bounds[0][0] == 0 and bounds[-1][1] == file.size
        assert all(a[1] == b[0] for a, b in pairwise(bounds))


@settings(max_examples=40)
@given(files, st.integers(1, 300))
def test_a_partition_is_no_larger_than_asked_unless_one_line_file_is(
    found: list[SourceFile], partition_bytes: int
) -> None:
    assert all(part.num_bytes <= partition_bytes for part in cut(found, "text", partition_bytes))


def test_a_partition_is_known_by_the_files_it_is_made_of() -> None:
    file = SourceFile("/a.txt", 10, "monday")
    (before,) = cut([file], "text", 100)
    (same,), (changed,) = cut([file], "text", 100), cut([SourceFile("/a.txt", 10, "friday")], "text", 100)
    assert before.key == same.key != changed.key


def test_compressed_files_and_csv_stay_whole() -> None:
    for name, kind in (("a.txt.gz", "text"), ("a.csv", "csv")):
        assert [len(part.pieces) for part in cut([SourceFile(f"/{name}", 1000)], kind, 10)] == [1]


def test_parquet_is_cut_at_its_row_groups() -> None:
    (first, second) = cut([SourceFile("/a.parquet", 100, row_groups=(40, 40, 20))], "parquet", 80)
    assert [(p.start, p.end) for part in (first, second) for p in part.pieces] == [(0, 2), (2, 3)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.TXT", "text"), ("b.jsonl.gz", "jsonl"), ("c.pq", "parquet"), ("d.JPG", "images"), ("e", None)],
)
def test_a_name_tells_the_format(name: str, kind: str | None) -> None:
    assert format_of(name) == kind


@pytest.mark.parametrize(
    ("name", "words"),
    [("lowercas", "Did you mean lowercase"), ("drop-short", "is written drop-short:20"), ("strip:3", "written strip")],
)
def test_a_step_that_is_none_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_step(name)


def test_steps_are_read_in_order() -> None:
    assert parse_steps("html, whitespace,drop-short:20") == ["html", "whitespace", "drop-short:20"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "where should the prepared data go"),
        ({"out": "x", "tokenizer": "t"}, "tokenizer is given without seq_len"),
        ({"out": "x", "seq_len": 8}, "seq_len is given without tokenizer"),
        ({"out": "x", "threshold": "7"}, "similarity from 0.1 to 1"),
        ({"out": "x", "partition_size": "3"}, "at least 1KiB"),
        ({"out": "x", "dedup": "some"}, "none, exact, near"),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PrepareSpec.make(given).checked()
