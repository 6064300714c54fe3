"""Which commit a run's folder was at: read from its files, since a process takes as long as a whole cell."""

from __future__ import annotations

import os
from pathlib import Path

_MAX_BYTES = 4 << 20


def git_state(folder: str) -> dict[str, str]:
    """{"commit", "branch", "folder"} of the work tree that holds a folder; {} where none does, or it cannot be read.

    Whether files differ from the commit is not told: that takes a look at each of them.
    """
    if not folder:
        return {}
    try:
        tree = folder
        while not os.path.lexists(os.path.join(tree, ".git")) or (found := _git_folder(Path(tree, ".git"))) is None:
            if (above := os.path.dirname(tree)) == tree:
                return {}
            tree = above
        return {**_head(found), "folder": tree}
    except (OSError, ValueError):
        pass
    return {}


def _git_folder(path: Path) -> Path | None:
    if path.is_dir():
        return path
    if not path.is_file():
        return None
    _, _, where = path.read_text(encoding="utf-8").partition("gitdir: ")  # of a further work tree, or a submodule
    return (path.parent / where.strip()) if where else None


def _head(git: Path) -> dict[str, str]:
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return {"commit": head, "branch": ""}
    name = head.removeprefix("ref: ")
    common = git / "commondir"
    shared = (git / common.read_text(encoding="utf-8").strip()) if common.exists() else git
    for place in (git, shared):
        if (place / name).is_file():
            return {"commit": (place / name).read_text(encoding="utf-8").strip(), "branch": _short(name)}
    packed = shared / "packed-refs"
    if packed.is_file() and packed.stat().st_size <= _MAX_BYTES:
        for line in packed.read_text(encoding="utf-8").splitlines():
            commit, _, ref = line.partition(" ")
            if ref == name:
                return {"commit": commit, "branch": _short(name)}
    return {"commit": "", "branch": _short(name)}


def _short(name: str) -> str:
    return name.removeprefix("refs/heads/")
