"""The socket to the agent that leads this world: what it sends, as long as it renews the lease of this rank."""

from __future__ import annotations

import os
import select
import socket
import time


class ControlSocket:
    """Heard by the side thread alone.

    Args:
        until: the end of the lease, on the monotonic clock; None: there is none.
    """

    def __init__(self, sock: socket.socket, until: float | None) -> None:
        self._sock = sock
        self._incoming = select.poll()
        self._incoming.register(sock, select.POLLIN)
        self._until = until

    def renew(self, until: float | None) -> None:
        """The agent lives."""
        self._until = until

    def receive(self) -> bytes:
        """What comes next; nothing when the agent has gone or has closed this rank. Ends the process with the lease."""
        while not self._incoming.poll(self._left_ms()):
            if self._left_ms() == 0:
                os._exit(0)  # whoever leads this world is not heard any more, and may have started another copy
        try:
            return self._sock.recv(1 << 20)
        except OSError:
            return b""

    def _left_ms(self) -> float | None:
        return None if self._until is None else max(0.0, 1000 * (self._until - time.monotonic()))
