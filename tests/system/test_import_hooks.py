"""Called back when a module is imported, once, and with the module as it is."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from jupyter_llmcloud.system.import_hooks import when_imported


@pytest.fixture(autouse=True)
def finders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])


def test_a_module_that_is_there_is_told_of_at_once() -> None:
    heard: list[str] = []
    when_imported("json", lambda: heard.append("json"))
    assert heard == ["json"]


def test_a_module_is_told_of_when_it_has_been_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hook_parent").mkdir()
    (tmp_path / "hook_parent" / "__init__.py").write_text("")
    (tmp_path / "hook_parent" / "late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    heard: list[int] = []
    for _ in range(2):
        when_imported("hook_parent.late", lambda: heard.append(sys.modules["hook_parent.late"].value))
    importlib.import_module("hook_parent")
    assert heard == []
    late = importlib.import_module("hook_parent.late")
    assert heard == [1, 1]
    importlib.reload(late)
    assert heard == [1, 1]
    assert "exec_module" not in vars(late.__loader__)


def test_a_module_that_is_not_installed_stays_missing() -> None:
    when_imported("no_such_module_here", lambda: pytest.fail("it was not imported"))
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_module_here")
