"""Modules of the user's own that a tracked cell imports are compiled like the cell: with their loops tracked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import TYPE_CHECKING

from jupyter_llmcloud.training.resume.user_code import is_own_file

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
        """What the other finders find; own modules with a loader that compiles them anew."""
        for finder in [found for found in sys.meta_path if found is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if type(spec.loader) is SourceFileLoader and is_own_file(spec.loader.path):
                    spec.loader = _TrackedLoader(spec.loader, self._code)
                return spec
        return None


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
