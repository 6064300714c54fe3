"""How this kernel shows paths: by the folder of the notebook, the home folder and the few others that are ours."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

from jupyter_llmcloud import config
from jupyter_llmcloud.core.output.paths import shorten
from jupyter_llmcloud.errors import LLMCloudError


def shown(text: str) -> str:
    """`text` without absolute paths: they are relative to the notebook's folder, or begin with what has a name."""
    if "/" not in text:
        return text
    return shorten(text, places(_working_folder(), str(Path.home()), str(config.root())))


def install() -> None:
    """Have the errors of this package that a cell ends with shown so."""
    LLMCloudError.shown = staticmethod(shown)


@lru_cache(maxsize=8)  # every cell shows a path, and its folders are looked up on disk
def places(working_folder: str, home: str, root: str) -> list[tuple[str, str]]:
    """Folders with what is shown in their place; as `shorten` takes them."""
    found = []
    for folder, name in (
        (working_folder, ""),
        (home, "~"),
        (root, f"${config.ENV_ROOT}" if os.environ.get(config.ENV_ROOT) else "<llmcloud>"),
        (str(Path(__file__).resolve().parents[3]), ""),
        (tempfile.gettempdir(), "$TMPDIR/…"),
        # This Python's own packages by their folder, which may have a space in its name.
        (os.path.dirname(sysconfig.get_path("purelib")), ""),
        (os.path.dirname(sysconfig.get_path("stdlib")), ""),
    ):
        if folder:
            found.append((folder, name))
            if (real := os.path.realpath(folder)) != folder:
                found.append((real, name))
    return found


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""
