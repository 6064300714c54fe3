"""Whether an error has come of a Stop."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.training.shell.script import was_stopped

# As `datasets` passes on what its workers have made, and asks them for their results in the end.
PASSES_ON = """
def passes_on(wait):
    try:
        while True:
            yield wait()
    finally:
        [][0]
"""
LIBRARY: dict[str, Any] = {"__name__": "json"}
exec(PASSES_ON, LIBRARY)  # as code of a module that is installed


def interrupted() -> None:
    raise KeyboardInterrupt


def fails() -> None:
    raise OSError("no room")


CELLS = {
    "the interrupt itself": ("wait()", True),
    "an error of a library over it": ("for _ in passes_on(wait): pass", True),
    "an error of a library": ("for _ in passes_on(fails): pass", False),
    "left by a library": ("try: wait()\nexcept KeyboardInterrupt: raise SystemExit(1)", True),
    "an error of the user's own over it": ("try: wait()\nexcept KeyboardInterrupt: fails()", False),
    "one that was caught before": ("try: wait()\nexcept KeyboardInterrupt: pass\nfails()", False),
}


@pytest.mark.parametrize(("cell", "is_stop"), CELLS.values(), ids=CELLS)
def test_a_library_that_fails_over_an_interrupt_was_stopped(cell: str, is_stop: bool) -> None:
    names = {"__name__": "__main__", "wait": interrupted, "fails": fails, "passes_on": LIBRARY["passes_on"]}
    with pytest.raises(BaseException) as raised:
        exec(compile(cell, "/notebooks/cell.py", "exec"), names)
    assert was_stopped(raised.value) is is_stop
