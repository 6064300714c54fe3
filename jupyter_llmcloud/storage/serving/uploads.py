"""Files that clients of an endpoint upload and get back: the input of a batch, and its results.

<root>/files/<id>/content     the bytes
                  file.json   {id, owner, filename, purpose, bytes, created}; the file is there when this is
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from jupyter_llmcloud import config
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.system.atomic_files import read_json, remove_folder, staged, write_json


@dataclass(frozen=True)
class StoredFile:
    """One file as it is kept.

    Attributes:
        owner: who it belongs to, as usage names them.
        purpose: batch or batch_output.
        created: seconds since the epoch.
    """

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created: float


class FileStore:
    """The files of one root."""

    def __init__(self, root: Path | None = None) -> None:
        self._folder = (root or config.root()) / "files"

    @contextmanager
    def write(self, owner: str, filename: str, purpose: str) -> Iterator[tuple[str, IO[bytes]]]:
        """A new file: its id, and where to write its bytes; it is there when the block ends without an error."""
        file_id = f"file-{secrets.token_hex(12)}"
        folder = self._folder / file_id
        folder.mkdir(mode=0o700, parents=True)
        with staged(folder / "content") as content:
            yield file_id, content
            size = content.tell()
        about = StoredFile(file_id, owner, filename, purpose, size, round(time.time(), 3))
        write_json(folder / "file.json", asdict(about))

    def find(self, file_id: str) -> StoredFile:
        """What is known of a file; raises NotFound."""
        about = self._read(file_id) if NAME_PATTERN.fullmatch(file_id) else None
        if about is None:
            raise NotFound(f"there is no file {file_id[:128]!r}.")
        return about

    def list(self) -> list[StoredFile]:
        """Every file, the newest first."""
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        # One that is deleted meanwhile is none of them.
        found = [about for folder in folders if (about := self._read(folder.name)) is not None]
        return sorted(found, key=lambda file: (-file.created, file.id))

    def _read(self, file_id: str) -> StoredFile | None:
        about = read_json(self._of(file_id) / "file.json")
        return None if about is None else StoredFile(**{name: about[name] for name in StoredFile.__dataclass_fields__})

    def path(self, file_id: str) -> Path:
        """Where its bytes are; raises NotFound."""
        return self._of(self.find(file_id).id) / "content"

    def delete(self, file_id: str) -> None:
        """Keep it no longer; raises NotFound."""
        remove_folder(self._of(self.find(file_id).id))

    def _of(self, file_id: str) -> Path:
        return self._folder / file_id
