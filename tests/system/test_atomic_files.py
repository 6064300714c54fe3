"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.system import atomic_files
from jupyter_llmcloud.system.atomic_files import (
    publish_folder,
    read_json,
    remove_folder,
    staged,
    sync,
    write_atomically,
    write_json,
)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the system, in order: `fsync` names what is synced."""
    seen: list[str] = []

    def fsync(fd: int) -> None:
        seen.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name.partition('.json')[0]}")

    def replace(old: Any, new: Any) -> None:
        seen.append("replace")
        os.rename(old, new)

    monkeypatch.setattr(atomic_files.os, "fsync", fsync)
    monkeypatch.setattr(atomic_files.os, "replace", replace)
    return seen


def test_a_file_is_replaced_whole_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    path.write_text("an older one")
    path.chmod(0o666)
    write_json(path, {"a": [1, "ä"]})
    assert read_json(path) == {"a": [1, "ä"]} and mode_of(path) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["about.json"]


def test_another_mode_is_less_what_the_umask_takes_away(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", b"x", mode=0o666)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "x") == 0o640


def test_a_durable_file_is_on_the_disk_before_it_has_its_name_and_the_name_is_then(
    tmp_path: Path, calls: list[str]
) -> None:
    write_atomically(tmp_path / "about.json", b"{}")
    assert calls == ["fsync .about", "replace", f"fsync {tmp_path.name}"]
    calls.clear()
    write_atomically(tmp_path / "about.json", b"{}", durable=False)
    assert calls == ["replace"]


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    write_atomically(path, b"before")
    with pytest.raises(ZeroDivisionError), staged(path) as file:
        file.write(b"half of it")
        1 / 0  # noqa: B018
    with pytest.raises(TypeError):
        write_json(path, object())
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "x", b"")


def test_what_is_written_piece_by_piece_is_there_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "log") as file:
        file.write(b"one ")
        assert not (tmp_path / "log").exists()
        file.write(b"two")
    assert (tmp_path / "log").read_bytes() == b"one two"


def test_threads_that_write_one_file_do_not_mix_what_they_write(tmp_path: Path) -> None:
    path, barrier = tmp_path / "x", threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait(10)
        for _ in range(20):
            write_atomically(path, bytes([number]) * 10_000, durable=False)
            assert len(set(path.read_bytes())) == 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(path.read_bytes())) == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_what_is_no_object_is_read_as_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    assert read_json(tmp_path / "x") is None


def test_a_folder_takes_the_place_of_another_one(tmp_path: Path, calls: list[str]) -> None:
    for name in ("staging", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    publish_folder(tmp_path / "staging", tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "staging"]
    assert calls == ["fsync staging", f"fsync {tmp_path.name}"]
    calls.clear()
    (tmp_path / "staging").mkdir()
    publish_folder(tmp_path / "staging", tmp_path / "other", durable=False)
    assert calls == [] and (tmp_path / "other").is_dir()


def test_a_folder_that_cannot_all_be_deleted_is_gone_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-1").mkdir()
    monkeypatch.setattr(atomic_files.shutil, "rmtree", lambda path, ignore_errors: None)
    remove_folder(tmp_path / "step-1")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".step-1.") and left.name.endswith(".gone")


def test_a_file_of_somebody_else_is_synced_too(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    sync(tmp_path / "weights")
    assert calls == ["fsync weights"]
