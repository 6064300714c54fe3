"""Which commit a run's folder was at: read from its files, since a process takes as long as a whole cell."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISREG

_MAX_BYTES = 4 << 20
_MAX_KNOWN = 64
_Stamps = dict[str, tuple[int, int, int] | None]  # of files by their paths; None for one that is not there
_known: dict[str, tuple[_Stamps, dict[str, str]]] = {}


def git_state(folder: str) -> dict[str, str]:
    """{"commit", "branch", "folder"} of the work tree that holds a folder; {} where none does, or it cannot be read.

    Whether files differ from the commit is not told: that takes a look at each of them. Every cell asks, so what was
    read is read again only when one of the files has changed.
    """
    if not folder:
        return {}
    if (known := _known.get(folder)) is not None and {path: _stamp(path) for path in known[0]} == known[0]:
        return dict(known[1])
    stamps: _Stamps = {}
    state = _read_state(folder, stamps)
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    if state:
        _known[folder] = stamps, state
    return dict(state)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not S_ISREG(found.st_mode):
        return found.st_ino, 0, 0  # a folder is another one when it is made anew, not when something in it changes
    return found.st_ino, found.st_size, found.st_mtime_ns


def _text(path: Path, stamps: _Stamps) -> str | None:
    """What is in a file, whose stamp is taken before; None where there is none."""
    stamps[str(path)] = _stamp(str(path))
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _read_state(folder: str, stamps: _Stamps) -> dict[str, str]:
    stamps[os.path.join(folder, ".git")] = _stamp(os.path.join(folder, ".git"))
    try:
        tree = folder
        while not os.path.lexists(os.path.join(tree, ".git")) or (found := _git_folder(Path(tree, ".git"))) is None:
            if (above := os.path.dirname(tree)) == tree:
                return {}
            tree = above
        return {**_head(found, stamps), "folder": tree}
    except (OSError, ValueError):
        return {}


def _git_folder(path: Path) -> Path | None:
    if path.is_dir():
        return path
    if not path.is_file():
        return None
    _, _, where = path.read_text(encoding="utf-8").partition("gitdir: ")  # of a further work tree, or a submodule
    return (path.parent / where.strip()) if where else None


def _head(git: Path, stamps: _Stamps) -> dict[str, str]:
    if (head := (_text(git / "HEAD", stamps) or "").strip()) == "":
        raise ValueError(f"{git} has no HEAD")
    if not head.startswith("ref: "):
        return {"commit": head, "branch": ""}
    name = head.removeprefix("ref: ")
    common = git / "commondir"
    shared = (git / common.read_text(encoding="utf-8").strip()) if common.exists() else git
    for place in dict.fromkeys((git, shared)):
        if (commit := _text(place / name, stamps)) is not None:
            return {"commit": commit.strip(), "branch": _short(name)}
    packed = shared / "packed-refs"
    stamps[str(packed)] = _stamp(str(packed))
    if packed.is_file() and packed.stat().st_size <= _MAX_BYTES:
        for line in packed.read_text(encoding="utf-8").splitlines():
            commit, _, ref = line.partition(" ")
            if ref == name:
                return {"commit": commit, "branch": _short(name)}
    return {"commit": "", "branch": _short(name)}


def _short(name: str) -> str:
    return name.removeprefix("refs/heads/")
