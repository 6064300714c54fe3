"""A checkpoint on disk is complete or does not count, whatever crashes, flips or fills up."""

from __future__ import annotations

import collections
import errno
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.storage.checkpoints import MANIFEST, CheckpointFolder, file_of, files_of_ranks, seal
from jupyter_llmcloud.storage.journal import JournalWriter, read_all

FILES = ("model.safetensors", "shared.pt", "rank-0000.pt")
ALIKE = ("rank-0000.model-1.safetensors", "rank-0001.model-1.safetensors")  # what two ranks hold alike
_WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def save(folder: CheckpointFolder, step: int, attempt: int = 0, keep: int | None = None, **about: Any) -> None:
    """What ranks and agent do together for one checkpoint."""
    staging = folder.staging(step, attempt)
    sealed = {}
    for name in FILES:
        (staging / name).write_bytes(f"{name} of step {step}".encode() * 100)
        sealed[name] = seal(staging / name)
    for name in ALIKE:
        (staging / name).write_bytes(f"weights of step {step}".encode() * 100)
        sealed[name] = seal(staging / name)
    folder.commit(staging, step, sealed, **about)
    if keep is not None:
        folder.retain(keep)


def steps(folder: CheckpointFolder) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.path.iterdir() if path.name.startswith("step-"))


def in_child(action: Callable[[], None]) -> int:
    """Run in a process of its own; returns its status as from os.waitstatus_to_exitcode."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """With checkpoints of steps 10 and 20."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 10)
    save(folder, 20)
    return folder


def test_the_newest_complete_checkpoint_is_found(folder: CheckpointFolder) -> None:
    found, words = folder.newest()
    assert found is not None
    assert (found.step, words) == (20, [])
    assert set(found.manifest["files"]) == {*FILES, ALIKE[0]}


def test_what_ranks_hold_alike_is_kept_once_and_read_by_each_ones_name(folder: CheckpointFolder) -> None:
    found, _ = folder.newest()
    assert found is not None
    assert found.manifest["same"] == {ALIKE[1]: ALIKE[0]}
    assert sorted(path.name for path in found.path.iterdir()) == sorted([*FILES, ALIKE[0], MANIFEST])
    assert {file_of(found.path, name).read_bytes() for name in ALIKE} == {b"weights of step 20" * 100}
    assert files_of_ranks(found) == {"model-1.safetensors": dict.fromkeys((0, 1), found.path / ALIKE[0])}


def test_what_a_rank_holds_that_is_another_by_one_byte_is_kept_as_its_own(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    staging = folder.staging(1, 0)
    held = {0: b"a", 1: b"b", 2: b"a", 3: b"b"}
    for rank, content in held.items():
        (staging / f"rank-{rank:04d}.optimizer-1.state").write_bytes(content)
        (staging / f"rank-{rank:04d}.pt").write_bytes(b"equal by chance, and each rank's own all the same")
    found = folder.commit(staging, 1, {path.name: seal(path) for path in staging.iterdir()})
    assert len(list(found.path.glob("rank-*.optimizer-1.state"))) == 2
    assert len(list(found.path.glob("rank-????.pt"))) == 4
    for rank, content in held.items():
        assert file_of(found.path, f"rank-{rank:04d}.optimizer-1.state").read_bytes() == content


def test_steps_are_numbers_not_text(folder: CheckpointFolder) -> None:
    save(folder, 100)
    found, _ = folder.newest()
    assert found is not None
    assert found.step == 100


def test_without_checkpoints_none_is_found(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "none").newest() == (None, [])


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_bit_anywhere_is_noticed_and_the_one_before_is_taken(folder: CheckpointFolder, name: str) -> None:
    path = folder.path / "step-20" / name
    for at in random.Random(name).sample(range(path.stat().st_size), 8):
        whole = bytearray(path.read_bytes())
        whole[at] ^= 1 << at % 8
        path.write_bytes(whole)
        found, words = folder.newest()
        assert found is not None
        assert found.step == 10, f"byte {at}"
        assert len(words) == 1
        assert "step-20 was skipped" in words[0]
        whole[at] ^= 1 << at % 8
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("harm", ["missing", "truncated", "empty", "longer"])
def test_a_missing_or_partial_file_is_noticed(folder: CheckpointFolder, name: str, harm: str) -> None:
    path = folder.path / "step-20" / name
    if harm == "missing":
        path.unlink()
    elif harm == "longer":
        path.write_bytes(path.read_bytes() + b" x")
    else:
        os.truncate(path, path.stat().st_size // 2 if harm == "truncated" else 0)
    found, words = folder.newest()
    assert found is not None
    assert found.step == 10
    assert name.split(".")[0] in words[0]


def test_a_manifest_cannot_name_files_elsewhere(folder: CheckpointFolder) -> None:
    import hashlib

    path = folder.path / "step-20" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"]["../../run.json"] = manifest["files"].pop("shared.pt")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**manifest, "sha256": hashlib.sha256(text).hexdigest()}))
    found, words = folder.newest()
    assert found is not None
    assert (found.step, "run.json" in words[0]) == (10, True)


def test_a_folder_under_another_steps_name_does_not_count(folder: CheckpointFolder) -> None:
    (folder.path / "step-20").rename(folder.path / "step-30")
    found, _ = folder.newest()
    assert found is not None
    assert found.step == 10


def test_one_that_a_run_cannot_go_on_from_is_passed_over_when_one_is_wanted(folder: CheckpointFolder) -> None:
    save(folder, 30, resumable=False)
    every, resumable = folder.newest()[0], folder.newest(resumable=True)[0]
    assert every is not None
    assert resumable is not None
    assert (every.step, resumable.step) == (30, 20)


def test_the_last_ones_and_the_best_are_retained(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step, loss in enumerate([0.9, 0.2, 0.5, 0.4, 0.3]):
        save(folder, step, keep=2, metric=loss, mode="min")
    assert steps(folder) == [1, 3, 4]


def test_the_best_may_be_the_highest(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step, accuracy in enumerate([0.1, 0.8, 0.5, 0.4]):
        save(folder, step, keep=1, metric=accuracy, mode="max")
    assert steps(folder) == [1, 3]


def test_a_checkpoint_of_the_same_step_replaces_the_old_one(folder: CheckpointFolder) -> None:
    save(folder, 20, attempt=1, world_size=4)
    found, words = folder.newest()
    assert found is not None
    assert (found.manifest["world_size"], words) == (4, [])
    folder.sweep()
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-10", "step-20"]


def test_a_crash_at_every_write_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    at, ends = 0, collections.Counter[int]()
    while True:
        path = tmp_path / str(at)
        CheckpointFolder(path).staging(0, 0)
        folder = CheckpointFolder(path)
        for step in (10, 20):
            save(folder, step)

        def crash(nth: int = at, folder: CheckpointFolder = folder) -> None:
            left = [nth]

            def hook(event: str, _: Any) -> None:
                if event in _WRITES:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(folder, 20, attempt=1, keep=1)
            save(folder, 30, attempt=1, keep=1)

        status = in_child(crash)
        found, words = folder.newest()
        assert found is not None, f"nothing loads after a crash at write {at}"
        assert words == []
        for name in ALIKE:
            assert file_of(found.path, name).read_bytes() == f"weights of step {found.step}".encode() * 100
        ends[found.step] += 1
        folder.sweep()
        assert all(name.startswith("step-") for name in os.listdir(path))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        at += 1
    assert at > 30
    assert set(ends) == {10, 20, 30}


def test_a_full_disk_leaves_the_checkpoints_before_untouched(folder: CheckpointFolder) -> None:
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save(folder, 30)
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG else 8)

    assert in_child(fill) == 7
    found, words = folder.newest()
    assert found is not None
    assert (found.step, words) == (20, [])


def test_a_journal_that_is_opened_again_goes_on_with_the_next_number(tmp_path: Path) -> None:
    path = tmp_path / "rank-0000.jsonl"
    first = JournalWriter(path)
    first.append([{"a": 1}, {"a": 2}])
    first.close()
    with path.open("ab") as file:
        file.write(b'{"seq":3,"torn')
    again = JournalWriter(path)
    again.append([{"a": 3}])
    again.append([{"a": 4}])
    again.close()
    assert [(record["seq"], record["a"]) for record in read_all(path)] == [(1, 1), (2, 2), (3, 3), (4, 4)]
