"""Journals: append-only, read by cursor, nothing twice, nothing lost but a torn line."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from pathlib import Path

import pytest

from jupyter_llmcloud.storage.journal import MOST_LATE, Cursor, JournalWriter, read_all, read_from


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "rank-0000.jsonl"


def written(path: Path, *texts: str) -> JournalWriter:
    writer = JournalWriter(path)
    writer.append([{"text": text} for text in texts])
    writer.close()
    return writer


def texts(records: list[dict[str, object]]) -> list[object]:
    return [record["text"] for record in records]


def test_records_are_numbered_and_stamped(path: Path) -> None:
    writer = JournalWriter(path)
    first = writer.append([{"text": "a", "t": 5.12345678}, {"text": "b"}])
    second = writer.append([{"text": "c"}])
    writer.close()
    assert [record["seq"] for record in first + second] == [1, 2, 3]
    assert first[0]["t"] == 5.1235
    assert list(read_all(path)) == first + second
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_file_is_made_before_the_first_record(path: Path) -> None:
    JournalWriter(path).close()
    assert not path.exists()
    assert read_from(path, Cursor()) == []


def test_an_append_after_close_goes_on_counting(path: Path) -> None:
    writer = written(path, "a")
    assert writer.append([{"text": "b"}])[0]["seq"] == 2
    writer.close()
    assert texts(list(read_all(path))) == ["a", "b"]


def test_a_cursor_delivers_each_record_once(path: Path) -> None:
    writer, cursor, seen = JournalWriter(path), Cursor(), []
    rng = random.Random(1)
    for number in range(200):
        writer.append([{"text": number}])
        if rng.random() < 0.3:
            seen += read_from(path, cursor)
    writer.close()
    seen += read_from(path, cursor)
    assert texts(seen) == list(range(200))
    assert read_from(path, cursor) == []


def test_a_cursor_saved_and_loaded_goes_on_where_it_was(path: Path) -> None:
    writer, cursor = written(path, "a", "b"), Cursor()
    read_from(path, cursor)
    again = Cursor(**json.loads(json.dumps(vars(cursor))))
    writer.append([{"text": "c"}])
    writer.close()
    assert texts(read_from(path, again)) == ["c"]


def test_a_line_without_its_end_waits(path: Path) -> None:
    written(path, "a")
    whole = json.dumps({"seq": 2, "t": 0, "text": "b"}) + "\n"
    cursor = Cursor()
    with path.open("a") as file:
        file.write(whole[:10])
        file.flush()
        assert texts(read_from(path, cursor)) == ["a"]
        assert read_from(path, cursor) == []
        file.write(whole[10:])
        file.flush()
        assert texts(read_from(path, cursor)) == ["b"]


def test_a_torn_last_line_is_left_out(path: Path) -> None:
    written(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-5])
    assert texts(list(read_all(path))) == ["a"]


def test_a_torn_line_in_the_middle_costs_only_itself(path: Path) -> None:
    written(path, "a")
    with path.open("a") as file:
        file.write('{"seq": 2, "t": 0, "te\n[1, 2]\n\n' + '{"seq": 3, "t": 0, "text": "c"}\n')
    assert texts(list(read_all(path))) == ["a", "c"]


def test_another_writer_goes_on_where_the_first_one_ended(path: Path) -> None:
    written(path, "a", "b")
    cursor = Cursor()
    assert texts(read_from(path, cursor)) == ["a", "b"]
    path.write_bytes(path.read_bytes() + b'{"seq": 3, "te')  # the first one was killed
    written(path, "c")
    assert [(record["seq"], record["text"]) for record in read_from(path, cursor)] == [(3, "c")]


def test_a_record_larger_than_a_read_is_delivered_and_so_is_what_follows(path: Path) -> None:
    written(path, "x" * 5000, "after")
    cursor, seen = Cursor(), []
    while records := read_from(path, cursor, max_bytes=100):
        seen += records
    assert texts(seen) == ["x" * 5000, "after"]


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 20])
def test_any_size_of_reads_delivers_everything(path: Path, size: int) -> None:
    written(path, *("y" * number for number in range(40)))
    cursor, seen = Cursor(), []
    while records := read_from(path, cursor, max_bytes=size):
        seen += records
    assert [len(str(text)) for text in texts(seen)] == list(range(40))


def test_strange_text_survives(path: Path) -> None:
    strange = "\u2028 \x85 \r \n \udc80 😀 \0"
    written(path, strange)
    assert texts(list(read_all(path))) == [strange]


def test_what_a_full_disk_does_not_take_is_written_once_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, write = [30], os.write

    def limited(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(fd, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", limited)
    writer = JournalWriter(path)
    for text in "abcd":
        writer.append([{"text": text}])
    assert writer.error is not None and list(read_all(path)) == []
    room[0] = 10**9
    writer.append([{"text": "e"}])
    writer.close()
    assert writer.error is None and texts(list(read_all(path))) == list("abcde")


def test_what_waits_for_room_has_a_bound_and_no_line_is_torn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def refused(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = JournalWriter(path)
    monkeypatch.setattr(os, "write", refused)
    for number in range(3000):
        writer.append([{"text": f"{number}{'x' * 1000}"}])
    monkeypatch.setattr(os, "write", write)
    writer.append([{"text": "last"}])
    writer.close()
    found = texts(list(read_all(path)))
    assert 900 < len(found) < 1100 and found[-1] == "last" and path.stat().st_size < MOST_LATE + 100
    assert all(str(text).startswith(str(number)) for number, text in enumerate(found[:-1]))
