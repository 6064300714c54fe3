"""Code and models that were kept to be served, and are served no more: their folders below `<root>/endpoints` go.

A folder goes when no endpoint of any server of this user has a revision that needs it, also not one to go back to. One
that was written within the last hour stays: whoever wrote it may be about to serve it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from jupyter_llmcloud.storage.models import served_code

STAYS_S = 3600.0
MODELS = "models"  # the folder of models that a kernel has written


def remove_unneeded(needed: Iterable[str], root: Path | None = None, stays_s: float = STAYS_S) -> list[Path]:
    """Remove the folders that are not needed; returns them.

    Args:
        needed: paths of files and folders that revisions are made of; those elsewhere do not matter.
    """
    base = served_code.folder(root).resolve()
    kept = {_folder_of(path, base) for path in needed}
    removed = []
    for folder in _folders(base):
        with contextlib.suppress(OSError):  # another server was faster
            if folder not in kept and time.time() - folder.stat().st_mtime > stays_s:
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def _folders(base: Path) -> list[Path]:
    """Those that hold something to serve each. Links and what is named otherwise are not ours."""
    found = []
    for parent, is_ours in ((base, served_code.is_digest), (base / MODELS, bool)):
        with contextlib.suppress(FileNotFoundError):
            rows = [row for row in os.scandir(parent) if row.is_dir(follow_symlinks=False)]
            found += [Path(row.path) for row in rows if is_ours(row.name)]
    return found


def _folder_of(path: str, base: Path) -> Path | None:
    """The folder below `base` that a path is in."""
    try:
        parts = Path(path).resolve().relative_to(base).parts
    except (ValueError, OSError):
        return None
    depth = 2 if parts[:1] == (MODELS,) else 1
    return base.joinpath(*parts[:depth])
