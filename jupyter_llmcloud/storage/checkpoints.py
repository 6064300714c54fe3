"""Checkpoints on disk: a folder is either complete or does not count.

<run>/checkpoints/step-40/              committed: every file is named in the manifest with its size and hash
                          manifest.json {"version", "step", "created", "files", "sha256", and what the run says of it}
                                        "same": {"rank-0001.model-1.safetensors": "rank-0000.model-1.safetensors"},
                                        files of ranks that were the same, byte by byte, of which one is kept
                  .step-60.1.7.staging/   being written by attempt 1 of the run as its seventh, not committed yet
                  .step-20.gone/        being deleted

A checkpoint is written to a staging folder, each file fsynced and hashed, and committed by one rename. Whatever is
found later is verified before it is trusted: sizes first, then hashes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.system.atomic_files import publish_folder, remove_folder, sync, write_atomically

MANIFEST = "manifest.json"
VERSION = 1
_COMMITTED = re.compile(r"step-(\d+)")
_LEFT_OVER = re.compile(r"\.step-\d+\..*")
_OF_RANK = re.compile(r"rank-(\d+)\.(\w+-\d+\.\w+)")  # the state of one of its objects


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; `manifest` as verified."""

    path: Path
    step: int
    manifest: dict[str, Any]


class CorruptCheckpoint(Exception):
    """What is wrong with a folder."""


def seal(path: Path) -> dict[str, Any]:
    """Make a written file durable; returns its size and hash as the manifest wants them."""
    sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _kept_once(staging: Path, files: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What ranks hold alike, of which the first one's file is kept: the files that are left, and what each stands for.

    Told by the hash of every byte that was written, by whoever commits: the ranks need not agree on anything.
    """
    first: dict[tuple[int, str], str] = {}
    same: dict[str, str] = {}
    for name in filter(_OF_RANK.fullmatch, sorted(files)):
        kept = first.setdefault((files[name]["size"], files[name]["sha256"]), name)
        if kept != name:
            same[name] = kept
            (staging / name).unlink()
    return {name: entry for name, entry in files.items() if name not in same}, same


def file_of(folder: Path, name: str) -> Path:
    """Where what a rank has written under this name is: in a file that stands for several, maybe."""
    if (folder / name).exists():
        return folder / name
    return folder / _read_manifest(folder).get("same", {}).get(name, name)


def files_of_ranks(checkpoint: Checkpoint) -> dict[str, dict[int, Path]]:
    """The files that ranks have written of objects, by what comes after `rank-0000.` and by rank."""
    written = {name: name for name in checkpoint.manifest["files"]} | checkpoint.manifest.get("same", {})
    found: dict[str, dict[int, Path]] = {}
    for name in sorted(written):
        if parts := _OF_RANK.fullmatch(name):
            found.setdefault(parts[2], {})[int(parts[1])] = checkpoint.path / written[name]
    return found


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def staging(self, step: int, attempt: int, serial: int = 0) -> Path:
        """Where an attempt of the run writes the checkpoint of a step; made if it is not there."""
        folder = self.staging_path(step, attempt, serial)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder

    def staging_path(self, step: int, attempt: int, serial: int = 0) -> Path:
        """The name of that folder."""
        return self.path / f".step-{step}.{attempt}.{serial}.staging"

    def commit(self, staging: Path, step: int, files: dict[str, dict[str, Any]], **about: Any) -> Checkpoint:
        """Write the manifest and rename: from then on the checkpoint counts. Raises OSError when it cannot."""
        for name, entry in files.items():
            if (staging / name).stat().st_size != entry["size"]:
                raise OSError(f"{staging / name} has not the size that was written")
        files, same = _kept_once(staging, files)
        about = {**about, **({"same": same} if same else {})}
        manifest = {"version": VERSION, "step": step, "created": round(time.time(), 3), **about, "files": files}
        manifest["sha256"] = _digest(manifest)
        write_atomically(staging / MANIFEST, json.dumps(manifest, indent=1).encode(), mode=0o666)
        target = self.path / f"step-{step}"
        publish_folder(staging, target)
        return Checkpoint(target, step, manifest)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: the run goes another way from here. Raises OSError."""
        for path in self._committed():
            if _step_of(path) > step:
                remove_folder(path)

    def newest(self, resumable: bool = False) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is complete, and a word on each newer one that had to be skipped.

        With `resumable` only those count from which a run can go on.
        """
        skipped: list[str] = []
        for path in self._committed():
            try:
                found = verify(path)
                if found.manifest.get("resumable", True) or not resumable:
                    return found, skipped
            except CorruptCheckpoint as error:
                skipped.append(f"{path.name} was skipped: {error}")
        return None, skipped

    def retain(self, keep: int, good_step: int | None = None) -> list[int]:
        """Delete all but the last `keep` and the best by metric; returns the steps that were deleted.

        Of a run that may be rolled back, the newest one of at most `good_step` is kept as well.
        """
        folders = self._committed()
        kept = set(folders[: max(1, keep)])
        if good_step is not None:
            kept.update([path for path in folders if _step_of(path) <= good_step][:1])
        if (best := _best(folders)) is not None:
            kept.add(best)
        gone = [path for path in folders if path not in kept]
        for path in gone:
            remove_folder(path)
        return [_step_of(path) for path in gone]

    def sweep(self, keep: Iterable[Path] = ()) -> None:
        """Remove what crashes have left behind, but for the folders to `keep`."""
        spared = set(keep)
        if self.path.is_dir():
            for path in self.path.iterdir():
                if _LEFT_OVER.fullmatch(path.name) and path not in spared:
                    shutil.rmtree(path, ignore_errors=True)

    def _committed(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(filter(_is_committed, self.path.iterdir()), key=_step_of, reverse=True)


def verify(path: Path) -> Checkpoint:
    """A committed checkpoint whose every byte is as it was written; raises CorruptCheckpoint."""
    manifest = _read_manifest(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in files.items():
        if "/" in name or name.startswith("."):
            raise CorruptCheckpoint(f"its manifest names a file {name!r}")
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise CorruptCheckpoint(f"{name} is missing") from None
        if size != entry["size"]:
            raise CorruptCheckpoint(f"{name} has {size} bytes, not {entry['size']}")
    for name, entry in files.items():
        with (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise CorruptCheckpoint(f"{name} does not hold what was written")
    return Checkpoint(path, manifest["step"], manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        digest = manifest.pop("sha256")
        right = digest == _digest(manifest) and manifest["step"] == _step_of(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptCheckpoint(f"its manifest cannot be read ({type(error).__name__})") from None
    if not right:
        raise CorruptCheckpoint("its manifest is not as it was written")
    if manifest["version"] != VERSION:
        raise CorruptCheckpoint(f"it is of version {manifest['version']}, not {VERSION}")
    return dict(manifest)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _is_committed(path: Path) -> bool:
    return _COMMITTED.fullmatch(path.name) is not None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _best(folders: list[Path]) -> Path | None:
    """The folder with the best metric; of equal ones the newest."""
    best: tuple[float, Path] | None = None
    for path in folders:
        try:
            manifest = _read_manifest(path)
        except CorruptCheckpoint:
            continue
        if (metric := manifest.get("metric")) is None:
            continue
        rank = -metric if manifest.get("mode") == "max" else metric
        if best is None or rank < best[0]:
            best = (rank, path)
    return best[1] if best else None
