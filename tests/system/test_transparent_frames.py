"""Functions that `stacklevel` does not count: a warning names their caller."""

from __future__ import annotations

import importlib
import linecache
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_llmcloud.system import transparent_frames

SOURCE = """
import contextlib, functools

def call(function):
    return function()

class Caller:
    def method(self, function):
        return (lambda: function())()

    @staticmethod
    def static(function):
        return call(function)

    @property
    def of(self):
        return call

    @functools.wraps(call)
    def wrapped(self, function):
        return [function() for _ in range(1)][0]

def make():
    def inner(function):
        return function()
    return inner
"""


@pytest.fixture
def between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module of a package that stands between a library and its caller."""
    (tmp_path / "between.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(transparent_frames, "_PACKAGE", str(tmp_path))
    monkeypatch.setattr(transparent_frames, "_MARKED", f"{tmp_path}/importlib._bootstrap/..")
    module = importlib.import_module("between")
    transparent_frames.make_transparent(["between"])
    transparent_frames.make_transparent(["between"])  # once more changes nothing
    yield module
    del sys.modules["between"]


def library() -> None:
    warnings.warn("look at the caller", stacklevel=2)


def test_a_warning_names_the_line_that_called(between: types.ModuleType) -> None:
    ways = [between.call, between.Caller().method, between.Caller.static, between.Caller().of, between.make()]
    for way in ways:
        with pytest.warns(UserWarning, match="look at the caller") as caught:
            way(library)
        assert caught[0].filename == __file__, way


def test_its_own_lines_are_still_in_tracebacks(between: types.ModuleType) -> None:
    linecache.clearcache()
    with pytest.raises(ZeroDivisionError) as raised:
        between.call(lambda: 1 / 0)
    assert "return function()" in "".join(traceback.format_exception(raised.value))
