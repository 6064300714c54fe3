"""What a traceback of a cell shows."""

from __future__ import annotations

import traceback

import pytest

from jupyter_llmcloud.training.run import Run
from jupyter_llmcloud.training.shell import no_stdin
from jupyter_llmcloud.training.shell.tracebacks import cut_refusal


def ask() -> None:
    no_stdin._refuse_to_ask("input()")(None)("name? ")


def debug() -> None:
    no_stdin._refuse_to_debug("breakpoint()")(None)()


def save() -> None:
    Run.checkpoint(object(), mode="most")  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", [ask, debug, save], ids=["input", "breakpoint", "checkpoint"])
def test_what_is_refused_on_purpose_ends_with_the_line_that_asked_for_it(cell: object) -> None:
    with pytest.raises((RuntimeError, ValueError)) as raised:
        cell()  # type: ignore[operator]
    cut_refusal(raised.value)
    assert traceback.extract_tb(raised.value.__traceback__)[-1].name == cell.__name__  # type: ignore[attr-defined]


def test_other_errors_keep_their_frames() -> None:
    with pytest.raises(KeyError) as raised:
        dict.fromkeys([])[1]
    before = len(traceback.extract_tb(raised.value.__traceback__))
    cut_refusal(raised.value)
    assert len(traceback.extract_tb(raised.value.__traceback__)) == before
