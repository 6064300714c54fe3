"""What a run is executed with, as far as results depend on it: kept in its record, so that runs can be compared."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from functools import cache

LIBRARIES = (
    "jupyter-llmcloud",
    "torch",
    "accelerate",
    "transformers",
    "safetensors",
    "numpy",
    "datasets",
    "peft",
    "trl",
    "lightning",
    "pytorch-lightning",
    "torchvision",
)
_ABOUT = re.compile(r"(?P<name>[^-]+)(?:-.*)?\.(?P<kind>dist|egg)-info$")
_SIGNS = re.compile(r"[-_.]+")


@cache
def library_versions() -> dict[str, str]:
    """The version of Python and of each library that is installed; takes some milliseconds, once.

    Read here, as `importlib.metadata` does, which would bring mail, archives and tables into each agent for that.
    """
    installed: dict[str, str] = {}
    for name, version in _installed():
        installed.setdefault(name, version)
    known = {name: installed[name] for name in LIBRARIES if name in installed}
    return {"python": platform.python_version(), **known}


def _installed() -> Iterator[tuple[str, str]]:
    """(name, version) of those that are asked for, in the order in which Python looks for them."""
    for place in sys.path:
        try:
            entries = os.listdir(place or ".")
        except OSError:
            continue  # an archive, or a folder that is not there
        for entry in entries:
            if match := _ABOUT.match(entry):
                name = _SIGNS.sub("-", match["name"]).lower()
                path = os.path.join(place, entry, "METADATA" if match["kind"] == "dist" else "PKG-INFO")
                if name in LIBRARIES and (version := _version_in(path)):
                    yield name, version


def _version_in(path: str) -> str:
    """What the head of a file says of the version; "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("Version:"):
                    return line.removeprefix("Version:").strip()
                if not line.strip():
                    break
    except OSError:
        pass
    return ""
