"""Files that are there whole or not at all: written to a staging file beside them, made durable, renamed over them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PRIVATE = 0o600  # nobody but its owner may read or change it


def write_atomically(path: str | Path, data: bytes, *, mode: int = PRIVATE, durable: bool = True) -> None:
    """Have `path` hold `data` from one moment to the next. Raises OSError, and then what was there before stays.

    Args:
        mode: of the new file, less what the umask takes away; the mode of a file that is replaced does not count.
        durable: wait until the file and its name are on the disk, so that a loss of power leaves it whole too. Without
            this it is whole for other processes only, which costs four system calls.
    """
    with _staging(path, mode, durable) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]


def write_json(path: Path, content: Any, *, mode: int = PRIVATE, durable: bool = True) -> None:
    """`write_atomically` of a JSON document."""
    write_atomically(path, json.dumps(content).encode(), mode=mode, durable=durable)


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when there is no such file, or something else in it."""
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def staged(path: Path, *, mode: int = PRIVATE, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends without an error."""
    with _staging(path, mode, durable) as fd, open(fd, "wb", closefd=False) as file:
        yield file


@contextlib.contextmanager
def _staging(path: str | Path, mode: int, durable: bool) -> Iterator[int]:
    folder, name = os.path.split(path)
    # Of a name of its own for each thread that writes: two that write one file at a time do not mix their bytes.
    staging = os.path.join(folder, f".{name}.{os.getpid()}.{threading.get_native_id()}.staging")
    fd = os.open(staging, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, mode)
    try:
        try:
            yield fd
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(staging, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(staging)
        raise
    if durable:
        sync_folder(Path(path).parent)


def publish_folder(staging: Path, path: Path, *, durable: bool = True) -> None:
    """Have the folder `staging` take the place of `path`. Raises OSError.

    Args:
        durable: wait until its names are on the disk; that its files are is for whoever wrote them to see to (`sync`).
    """
    if durable:
        sync_folder(staging)
    before = _move_away(path) if path.exists() else None
    os.rename(staging, path)
    if durable:
        sync_folder(path.parent)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; it is never seen half deleted under its name. Raises OSError when it cannot be renamed."""
    shutil.rmtree(_move_away(path), ignore_errors=True)


def _move_away(path: Path) -> Path:
    gone = path.with_name(f".{path.name}.{time.time_ns()}.gone")
    os.rename(path, gone)
    return gone


def sync(path: Path) -> None:
    """Wait until a file that is written is on the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
