"""The socket to the agent that leads this world: what it sends, as long as it renews the lease of this rank."""

from __future__ import annotations

import os
import select
import socket
import time

from jupyter_llmcloud.training.termination import Termination


class ControlSocket:
    """Heard by the side thread alone.

    Args:
        until: the end of the lease, on the monotonic clock; None: there is none.
    """

    def __init__(self, sock: socket.socket, until: float | None) -> None:
        self._sock = sock
        self._termination = Termination()
        self._termination.install()
        self._incoming = select.poll()
        self._incoming.register(sock, select.POLLIN)
        self._incoming.register(self._termination.fd, select.POLLIN)
        self._until = until

    def renew(self, until: float | None) -> None:
        """The agent lives."""
        self._until = until

    def outlive_sigterm(self) -> None:
        """The agent is told to end, and so was this rank: the agent says when."""
        self._termination.hold()

    def receive(self) -> bytes:
        """What comes next; nothing when the agent has gone or has closed this rank. Ends the process with the lease."""
        while self._sock.fileno() not in dict(self._incoming.poll(self._left_ms())):
            if self._termination.left_s() == 0:
                self._termination.end()
            if self._leased_s() == 0:
                os._exit(0)  # whoever leads this world is not heard any more, and may have started another copy
        try:
            return self._sock.recv(1 << 20)
        except OSError:
            return b""

    def _left_ms(self) -> float | None:
        left_s = [left_s for left_s in (self._leased_s(), self._termination.left_s()) if left_s is not None]
        return 1000 * min(left_s) if left_s else None

    def _leased_s(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic())
