"""What a failed cell leaves in memory is let go of: batches, activations, a model half made, loaders and their workers.

A traceback holds every frame that it passed, a frame its variables, and on Python before 3.13 also the copy of them
that somebody who drew it has looked at. The rest hangs in circles, as models, optimizers and exceptions do, and would
wait for a collection that knows nothing of gigabytes: the next cell would not find room for its own.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections.abc import Iterator

from jupyter_llmcloud.system.processes import give_back_memory


def let_go(error: BaseException) -> None:
    """Empty the frames of an error and of those that it came from, and collect what was held by them.

    Its text and its lines stay: a cell that has kept it can still print it.
    """
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)
        _forget_copies(one)
    _clear_callers(error)
    gc.collect()
    give_back_memory()


def forget() -> None:
    """Another cell has ended well: an error before it, which may hold tensors itself, is no longer kept for `%tb`."""
    for name in ("last_exc", "last_value", "last_traceback", "last_type"):
        vars(sys).pop(name, None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    pending, seen = [error, getattr(sys, "last_value", None)], set()
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:  # `raise e from e` makes a circle
            continue
        seen.add(id(one))
        yield one
        pending += [one.__cause__, one.__context__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]


def _clear_callers(error: BaseException) -> None:
    """The shell's own frames, from which the cell was called, hold the error that their callees hold: a circle."""
    frame = error.__traceback__.tb_frame.f_back if error.__traceback__ is not None else None
    while frame is not None:
        with contextlib.suppress(RuntimeError):  # it is being executed
            frame.clear()
        frame = frame.f_back


def _forget_copies(error: BaseException) -> None:
    step = error.__traceback__
    while step is not None:
        _ = step.tb_frame.f_locals  # brings the copy up to date, and nothing is left
        step = step.tb_next
