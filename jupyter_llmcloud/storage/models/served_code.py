"""Code that is served: the sources of cells and pickled objects, each in a folder of its own below the root.

    <root>/endpoints/<digest>/cell.json     a cell with its place in its notebook; cell.py beside it, for people
    <root>/endpoints/<digest>/object.pkl    a function or an object of a kernel

Whoever may start endpoints may run code on this server anyway. Nothing outside of this folder is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.core.serving.models.cell_source import CellSource
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.system.atomic_files import read_json, write_atomically, write_json

CELL = "cell.json"
OBJECT = "object.pkl"
OBJECT_RECORD = "object.json"
_DIGEST = re.compile(r"[0-9a-f]{16}")


def folder(root: Path | None = None) -> Path:
    """Where code is kept."""
    return (root or config.root()) / "endpoints"


def is_digest(name: str) -> bool:
    """Whether a folder with this name holds code that was kept here."""
    return _DIGEST.fullmatch(name) is not None


def write_cell(source: CellSource, root: Path | None = None) -> Path:
    """Keep a cell; returns its file, which is the same for the same cell."""
    record = source.as_record()
    path = _made(json.dumps(record, sort_keys=True).encode(), root) / CELL
    write_json(path, record)
    write_atomically(path.with_suffix(".py"), source.text.encode("utf-8", "surrogatepass"))
    return path


def write_object(pickled: bytes, working_folder: str, root: Path | None = None, *, has_tokenizer: bool = False) -> str:
    """Keep a pickled object; returns the digest by which `object_file` finds it.

    With `has_tokenizer` it is a dict of a model and its tokenizer.
    """
    made = _made(pickled + b"\0" + working_folder.encode(), root)
    write_atomically(made / OBJECT, pickled)
    write_json(made / OBJECT_RECORD, {"folder": working_folder, "has_tokenizer": has_tokenizer})
    return made.name


def object_record(path: Path) -> dict[str, Any]:
    """What is known of a kept object: {"folder", "has_tokenizer"}."""
    return {"folder": "", "has_tokenizer": False} | (read_json(path.with_name(OBJECT_RECORD)) or {})


def object_file(digest: str, root: Path | None = None) -> Path:
    """The file of an object that was kept; raises NotFound."""
    path = folder(root) / digest / OBJECT
    if not _DIGEST.fullmatch(digest) or not path.is_file():
        raise NotFound(
            f"there is no object {digest[:32]!r} on this server: the kernel must have the same {folder(root)}."
        )
    return path


def read_cell(path: Path) -> CellSource:
    """The cell in a file that `write_cell` gave. Raises OSError, ValueError."""
    return CellSource(**json.loads(path.read_bytes()))


def fingerprint(path: Path) -> str:
    """Changes when the code does."""
    return path.parent.name[:12]


def _made(content: bytes, root: Path | None) -> Path:
    made = folder(root) / hashlib.sha256(content).hexdigest()[:16]
    made.mkdir(mode=0o700, parents=True, exist_ok=True)
    return made
