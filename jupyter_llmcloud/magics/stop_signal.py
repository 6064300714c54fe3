"""The notebook's Stop while a cell waits: counted, never raised in the middle of a message."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """Within the block SIGINT makes `fd` readable and is counted in `presses`. Works in the main thread only."""

    def __init__(self) -> None:
        self.presses = 0
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        self._previous: object = None
        self._installed = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._press)
            self._installed = True
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.presses += 1
        os.write(self._write, b".")

    def drain(self) -> None:
        """Make `fd` quiet again."""
        try:
            os.read(self.fd, 1024)
        except BlockingIOError:
            pass

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]
        os.close(self.fd)
        os.close(self._write)
