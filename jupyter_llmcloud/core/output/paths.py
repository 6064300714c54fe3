"""Absolute paths out of what is shown: a notebook is shared, and where it was made is nobody's business."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ANSI = re.compile(r"(\x1b\[[0-9;]*m)")
_PART = r"[^\s/:'\"<>|=,;()\[\]]+"
# What a package is reached by says nothing that its name does not, on this host or another one.
_LIBRARY = re.compile(rf"(?<![\w.~$-])(?:/{_PART})*/(?=(?:site|dist)-packages/)")
_STANDARD_LIBRARY = re.compile(rf"(?<![\w.~$-])(?:/{_PART})*/lib(?:64)?/(?=python3\.\d+/)")
_CELL = re.compile(rf"(?<![\w.~$-])(?:/{_PART})*/ipykernel_\d+/\d+\.py")


def shorten(text: str, places: Sequence[tuple[str, str]]) -> str:
    """`text` with paths as a reader on any machine would write them.

    Args:
        text: may hold colours of a terminal.
        places: absolute folders with what stands for them, such as ("/home/me", "~"); "" makes paths relative, and
            "…" at the end of a name leaves out the folders between it and the last part.
    """
    return "".join(piece if _ANSI.fullmatch(piece) else _plain(piece, places) for piece in _ANSI.split(text))


def _plain(text: str, places: Sequence[tuple[str, str]]) -> str:
    if "/" not in text:
        return text
    text = _CELL.sub("<cell>", text)
    for pattern in (_LIBRARY, _STANDARD_LIBRARY):
        text = pattern.sub("", text)
    for folder, name in sorted(places, key=lambda place: len(place[0]), reverse=True):
        if len(folder) > 1:
            text = _replaced(text, folder, name)
    return text


def _replaced(text: str, folder: str, name: str) -> str:
    path = rf"(?<![\w.~$/-]){re.escape(folder)}"
    if name.endswith("…"):
        text = re.sub(rf"{path}/(?:{_PART}/)+(?={_PART})", lambda _: f"{name}/", text)
        name = name.removesuffix("/…")
    text = re.sub(path + r"/(?=[^/\s])", lambda _: f"{name}/".lstrip("/"), text)
    return re.sub(path + r"/?(?![\w-])", lambda _: name or ".", text)
