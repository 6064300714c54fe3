"""Modules of the user's own that a tracked cell imports are compiled like the cell: with their loops tracked."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.training.resume.user_code import is_own_file, own_folders

if TYPE_CHECKING:
    from jupyter_llmcloud.training.resume.loops.instrumentation import InstrumentedCode


class ModuleFinder(MetaPathFinder):
    """Stands before the finders of this process between `begin` and `end`."""

    def __init__(self, code: InstrumentedCode) -> None:
        self._code = code

    def begin(self) -> None:
        """Ask this finder first."""
        sys.meta_path.insert(0, self)

    def end(self) -> None:
        """Ask it no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, where that is a module of the user's own: with a loader that compiles it anew.

        Whatever else is looked for is left to them. Accelerate looks in each `backward` and `step` for packages that
        are not installed: to search all of sys.path for those a second time is felt in a short step.
        """
        others = [finder for finder in sys.meta_path if finder is not self]
        searched = sys.path if path is None else path
        if not any(_own_loader(spec) for spec in _found(others, fullname, path, target, own_folders(searched))):
            return None
        spec = next(_found(others, fullname, path, target, searched), None)
        if spec is not None and (loader := _own_loader(spec)) is not None:
            spec.loader = _TrackedLoader(loader, self._code)
        return spec


def _found(
    finders: list[Any], name: str, path: Sequence[str] | None, target: ModuleType | None, folders: Sequence[str]
) -> Iterator[ModuleSpec]:
    """What each of them finds; Python's own finder of files in these folders."""
    for finder in finders:
        spec = finder.find_spec(name, folders if finder is PathFinder else path, target)
        if spec is not None:
            yield spec


def _own_loader(spec: ModuleSpec) -> SourceFileLoader | None:
    loader = spec.loader
    return loader if type(loader) is SourceFileLoader and is_own_file(loader.path) else None


class _TrackedLoader(SourceFileLoader):
    """Executes a module with its loops tracked; afterwards the module has its ordinary loader."""

    def __init__(self, ordinary: SourceFileLoader, code: InstrumentedCode) -> None:
        super().__init__(ordinary.name, ordinary.path)
        self._ordinary = ordinary
        self._code = code

    def get_code(self, fullname: str) -> CodeType | None:
        try:
            # Nothing is written to __pycache__, where other programs would find it.
            return self._code.of_module(self.path, self.get_data(self.path))
        except (SyntaxError, ValueError, OSError):
            return super().get_code(fullname)  # which says what is wrong with it

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.__loader__ = self._ordinary
        if module.__spec__ is not None:
            module.__spec__.loader = self._ordinary
