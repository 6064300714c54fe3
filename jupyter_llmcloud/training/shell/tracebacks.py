"""Tracebacks of cells that IPython draws poorly: as Python draws them, with the notebook's names of cells."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from jupyter_llmcloud.training import patches

MAX_DRAWN = 100  # frames, in IPython's way
NUM_ENDS = 20
_REFUSING = ("jupyter_llmcloud.training.shell.no_stdin", "jupyter_llmcloud.training.run")
_AROUND = re.compile(r"/IPython/core/(interactiveshell|async_helpers)\.py$|/jupyter_llmcloud/training/rank\.py$")


class _Shortened(traceback.StackSummary):
    """Of very many frames the first and the last."""

    def format(self, **options: Any) -> list[str]:
        if len(self) <= 2 * NUM_ENDS:
            return super().format(**options)
        first, last = (traceback.StackSummary(self[part]) for part in (slice(NUM_ENDS), slice(-NUM_ENDS, None)))
        left_out = f"  [{len(self) - 2 * NUM_ENDS:,} frames between are left out]\n"
        return [*first.format(**options), left_out, *last.format(**options)]


def draw_plainly(error: BaseException, cell_number: Callable[[str], int | None]) -> list[str]:
    """The lines of a traceback, without the frames that execute cells and take signals."""
    drawing = traceback.TracebackException.from_exception(error)
    _tidy(drawing, cell_number, set())
    return "".join(drawing.format()).splitlines()


def _tidy(drawing: traceback.TracebackException, cell_number: Callable[[str], int | None], seen: set[int]) -> None:
    if id(drawing) in seen:
        return
    seen.add(id(drawing))
    kept = _Shortened(frame for frame in drawing.stack if not _AROUND.search(frame.filename))
    for frame in kept:
        if number := cell_number(frame.filename):
            _ = frame.line  # found by the name of its file, which is not what the reader knows it by
            frame.filename = f"Cell In[{number}]"
    drawing.stack = kept
    inner = [drawing.__cause__, drawing.__context__, *(getattr(drawing, "exceptions", None) or ())]
    for other in inner:
        if other is not None:
            _tidy(other, cell_number, seen)


def cut_refusal(error: BaseException) -> None:
    """Let the traceback of what was refused on purpose, as input() is, end with the line that asked for it."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        if step.tb_next.tb_frame.f_globals.get("__name__") in _REFUSING:
            step.tb_next = None
        step = step.tb_next


def holds_group(error: BaseException | None) -> bool:
    """Whether an exception group is part of what would be drawn; IPython prints those to stderr."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, BaseExceptionGroup):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def is_deep(error: BaseException | None) -> bool:
    """Whether it has very many frames, as a recursion has: IPython takes seconds to draw them."""
    step, num_frames = (error.__traceback__ if error is not None else None), 0
    while step is not None:
        step, num_frames = step.tb_next, num_frames + 1
    return num_frames > MAX_DRAWN


def came_from(error: BaseException, place: re.Pattern[str]) -> bool:
    """Whether it passed through code whose file is so named."""
    step = error.__traceback__
    while step is not None:
        if place.search(step.tb_frame.f_code.co_filename):
            return True
        step = step.tb_next
    return False


def text_of(error: BaseException) -> str:
    """Its message; what it says of itself may fail in turn."""
    try:
        return str.__str__(str(error))  # a text of a class of its own could not be sent
    except Exception as failed:
        return f"<its message cannot be shown: {type(failed).__name__} in __str__>"


def point_at_the_failing_line() -> None:
    """Let IPython find cells, whose files are nowhere on disk, in the cache of lines.

    It would draw the line where a frame ended up, such as the head of a `with`, and every frame of a recursion.
    """

    def make(count: Any) -> Any:
        def get_line_number_of_frame(frame: FrameType) -> int:
            try:
                return int(count(frame))
            except OSError:
                return len(linecache.getlines(frame.f_code.co_filename))

        return get_line_number_of_frame

    patches.FAILING_LINES.apply({"IPython.core.ultratb:get_line_number_of_frame": make})
