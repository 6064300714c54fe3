"""A program that was forked from the zygote, whose parent is not this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal


class ForkedProcess:
    """As `asyncio.subprocess.Process`, as far as replicas need it.

    Args:
        ended: gets its exit status, the negative number of a signal that ended it.
    """

    def __init__(self, pid: int, ended: asyncio.Future[int]) -> None:
        self.pid = pid
        self._ended = ended
        self._descriptor: int | None = None  # names this process also when another one gets its number
        with contextlib.suppress(ProcessLookupError):
            self._descriptor = os.pidfd_open(pid)
        ended.add_done_callback(lambda _: self._forget())

    @property
    def returncode(self) -> int | None:
        """Its exit status; None as long as it lives."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Its exit status, when it has ended."""
        return await asyncio.shield(self._ended)

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError when it has gone."""
        if self._descriptor is None:
            raise ProcessLookupError(self.pid)
        signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        """Raises ProcessLookupError when it has gone."""
        self.send_signal(signal.SIGKILL)

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
