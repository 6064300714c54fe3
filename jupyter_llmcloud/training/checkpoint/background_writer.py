"""The checkpoints of a rank are written by a thread, one at a time, while the cell goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from jupyter_llmcloud.protocol.frames import replace
from jupyter_llmcloud.protocol.rank_messages import CheckpointPart
from jupyter_llmcloud.training.checkpoint.stager import Stager
from jupyter_llmcloud.training.output.sender import OutputSender

_MAX_LATE = 3  # checkpoints in a row, after which no more are tried
_THREAD = "llmcloud-checkpoint"

WritePart = Callable[[], CheckpointPart]  # copies what is left, writes; returns what to tell the agent


class BackgroundWriter:
    """Writes, and tells the agent what came of it.

    Attributes:
        stager: of the tensors that are written.
        has_given_up: no more checkpoints are tried in this cell.
    """

    def __init__(self, sender: OutputSender) -> None:
        self._sender = sender
        self._thread: threading.Thread | None = None
        self.stager = Stager()
        self.clear()

    def clear(self) -> None:
        """A new cell."""
        if not self.stager.is_new:  # most cells save nothing
            self.stager = Stager()
        self.has_given_up = False
        self._serial = self._serial_step = 0
        self._num_late = 0

    def next_serial(self, step: int) -> int:
        """Numbers the checkpoints that a cell tries of one step: two of them are written apart."""
        self._serial = self._serial + 1 if step == self._serial_step else 1
        self._serial_step = step
        return self._serial

    @property
    def is_busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, at_most_s: float | None = None) -> None:
        """Return when none is being written, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(at_most_s)
            if not self._thread.is_alive():
                self._thread = None

    def before_step(self, *_: Any) -> None:
        """An optimizer is about to step: what it changes must have been copied."""
        self.stager.wait(lambda: self.is_busy)

    def write(self, part: CheckpointPart, write: WritePart) -> None:
        """Have this rank's part of a checkpoint written."""
        self._num_late = 0
        self._start(part, write)

    def refuse(self, part: CheckpointPart, error: Exception) -> None:
        """Tell the agent that this rank saves no part, and why. It may try again where the ranks were out of step."""
        self._num_late += 1
        self.has_given_up = not isinstance(error, TimeoutError) or self._num_late >= _MAX_LATE
        self.stager.discard()
        refusal = replace(part, error=f"{type(error).__name__}: {error}")
        self._start(part, lambda: refusal)

    def _start(self, part: CheckpointPart, write: WritePart) -> None:
        # Also a refusal leaves through a thread: an interrupt must not tear a frame on the rank's socket.
        work = (self._sender, part, write)
        self._thread = threading.Thread(target=_report, args=work, name=_THREAD, daemon=True)
        self._thread.start()


def _report(sender: OutputSender, part: CheckpointPart, write: WritePart) -> None:
    began = time.thread_time()
    try:
        part = write()
        part = replace(part, cpu_s=part.cpu_s + time.thread_time() - began)
    except Exception as error:
        part = replace(part, error=_message_of(error))
    with contextlib.suppress(OSError):  # the agent has gone, and this process ends with it
        sender.send(part)


def _message_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
