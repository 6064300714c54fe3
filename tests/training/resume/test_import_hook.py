"""Which modules a tracked cell compiles anew, and what it costs to look for others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.training.resume.loops import import_hook
from jupyter_llmcloud.training.resume.loops.import_hook import ModuleFinder

CODE: Any = None  # nothing is executed


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    (folder / "own_package").mkdir(parents=True)
    for name in ("own_module.py", "own_package/__init__.py", "own_package/inner.py"):
        (folder / name).write_text("for i in range(3): pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return folder


def _loader(name: str, path: list[str] | None = None) -> str | None:
    spec = ModuleFinder(CODE).find_spec(name, path)
    return None if spec is None else type(spec.loader).__name__


def test_modules_and_packages_of_the_user_are_compiled_anew(own_folder: Path) -> None:
    assert _loader("own_module") == "_TrackedLoader"
    assert _loader("own_package") == "_TrackedLoader"
    assert _loader("own_package.inner", [str(own_folder / "own_package")]) == "_TrackedLoader"


def test_a_module_of_the_present_folder_is_compiled_anew(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", *(path for path in sys.path if path != str(own_folder))])
    monkeypatch.chdir(own_folder)
    assert _loader("own_module") == "_TrackedLoader"


@pytest.mark.parametrize("name", ["accelerate", "json", "sys", "no_such_module"])
def test_libraries_and_what_is_missing_are_left_to_the_other_finders(own_folder: Path, name: str) -> None:
    assert _loader(name) is None


def test_a_library_that_comes_first_in_the_path_is_not_taken_for_a_module_of_its_name(own_folder: Path) -> None:
    (own_folder / "accelerate.py").write_text("")
    assert _loader("accelerate") != "_TrackedLoader"
    sys.path.insert(0, str(own_folder))
    assert _loader("accelerate") == "_TrackedLoader"


def test_a_finder_of_an_editable_installation_is_asked_too(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Editable:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> ModuleSpec | None:
            return PathFinder.find_spec(name, [str(own_folder)]) if name == "own_module" else None

    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(own_folder)])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    assert _loader("own_module") == "_TrackedLoader"


def test_what_is_not_installed_is_looked_for_in_the_users_folders_only(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    class Watched(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
            searched.extend(sys.path if path is None else path)
            return None

    monkeypatch.setattr(import_hook, "PathFinder", Watched)
    monkeypatch.setattr(sys, "meta_path", [Watched])
    assert _loader("lomo_optim") is None
    assert str(own_folder) in searched
    assert not [folder for folder in searched if folder.startswith((sys.prefix, sys.base_prefix))]
