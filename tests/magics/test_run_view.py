"""The view of a run in its cell, by values."""

from __future__ import annotations

import gc
import weakref

import pytest

from jupyter_llmcloud.magics.output.run_view import RunDisplay


def test_a_view_whose_run_has_ended_waits_for_no_collection(capsys: pytest.CaptureFixture[str]) -> None:
    """It holds all that a run has printed, and a notebook runs many cells."""
    gc.collect()
    gc.disable()
    try:
        view = RunDisplay("shown-1", "shown", [0, 1], lambda: None)
        view.records("logs", 0, [{"seq": 1, "t": 0.0, "kind": "stdout", "text": "said\n"}])
        view.finish("finished")
        parts = [weakref.ref(view), weakref.ref(view.folder), weakref.ref(view.live)]
        del view
        assert [part() for part in parts] == [None, None, None]
    finally:
        gc.enable()
    assert "said" in capsys.readouterr().out
