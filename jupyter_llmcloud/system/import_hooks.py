"""Calling back when a module is imported, for what concerns a library that most programs never load."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_waiting: dict[str, list[Callable[[], None]]] = {}  # by name of the module


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call back as soon as the module has been executed: at once, when it is there already."""
    if name in sys.modules:
        callback()
        return
    _waiting.setdefault(name, []).append(callback)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module that is waited for, and executes what comes after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        callbacks = _waiting.pop(fullname)  # whoever asks the finders again gets the module as it is
        spec = _found_by_others(self, fullname, path, target)
        if spec is None or spec.loader is None:
            _waiting[fullname] = callbacks
        else:
            _call_after(spec.loader, callbacks)
        return spec


def _found_by_others(
    finder: _Finder, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> importlib.machinery.ModuleSpec | None:
    for other in sys.meta_path:
        find = getattr(other, "find_spec", None)
        if other is not finder and find is not None and (spec := find(name, path, target)) is not None:
            found: importlib.machinery.ModuleSpec = spec
            return found
    return None


def _call_after(loader: importlib.abc.Loader, callbacks: list[Callable[[], None]]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        for callback in callbacks:
            callback()

    loader.exec_module = exec_module  # type: ignore[method-assign]
