"""Which code is the user's own: the notebook's, and modules that are part of no installation."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType

_PACKAGE = str(Path(__file__).parents[2])
_GENERATED = "_remote_module_"  # torch writes modules of this name to a temporary folder, up to 2.6 when it is imported


@functools.cache
def _installed(path_of_modules: tuple[str, ...]) -> tuple[str, ...]:
    paths = {sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages(), _PACKAGE}
    paths |= {path for name, path in sysconfig.get_paths().items() if name != "data"}
    paths |= {path for path in path_of_modules if _holds_distributions(path)}
    return tuple(str(Path(path).resolve()) + "/" for path in paths if path not in ("/", "/usr", "/usr/local"))


@functools.cache
def _holds_distributions(folder: str) -> bool:
    """Whether packages are installed here: of another environment by a .pth file, by `pip install --target`, ..."""
    return any(Path(folder or os.curdir).glob("*.dist-info"))


@functools.cache
def is_own_file(path: str) -> bool:
    """Whether a source file belongs to no installation."""
    installed = _installed(tuple(sys.path))
    if not path.endswith(".py") or path.startswith(installed):
        return False
    return not str(Path(path).resolve()).startswith(installed)


def own_folders(path: Sequence[str]) -> list[str]:
    """Those folders of a search path in which no packages are installed."""
    installed = _installed(tuple(sys.path))
    return [folder for folder in path if not folder or not _resolved(folder).startswith(installed)]


@functools.cache
def _resolved(folder: str) -> str:
    return f"{Path(folder).resolve()}/"


@functools.cache
def is_own_module(name: str) -> bool:
    """Whether a module is the notebook, or of the user's own files."""
    if name == "__main__":
        return True
    if name.startswith(_GENERATED):
        return False
    path = getattr(sys.modules.get(name), "__file__", None)
    return isinstance(path, str) and os.path.isabs(path) and is_own_file(path)  # torch.ops names a file that is nowhere


def own_modules() -> list[tuple[str, ModuleType]]:
    """The user's own modules that are imported now, by name, without the notebook."""
    return [(name, module) for name in _own_names(*_newest()) if (module := sys.modules.get(name)) is not None]


def _newest() -> tuple[int, str]:
    """Others than before when a module was imported since: that comes last. There are thousands to look through."""
    return len(sys.modules), next(reversed(sys.modules))


@functools.lru_cache(maxsize=1)
def _own_names(_number: int, _last: str) -> list[str]:
    return [name for name in list(sys.modules) if name != "__main__" and is_own_module(name)]


def is_own_frame(frame: FrameType) -> bool:
    """Whether a frame runs the user's own code."""
    name = str(frame.f_globals.get("__name__"))
    if name == "__main__":
        return not frame.f_code.co_filename.startswith(_PACKAGE)  # this process began in ours
    return is_own_module(name)
