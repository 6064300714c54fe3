"""A wire that can be cut, held up and mended: everything that passes goes through a thread of the test's."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from pathlib import Path


class Wire:
    """Listens where `listen` says (a path, or None for a free port of loopback) and carries connections to `target`."""

    def __init__(self, target: str | tuple[str, int], listen: Path | None = None) -> None:
        self.num_connections = 0
        self._target = target
        self._lock = threading.Lock()
        self._held = threading.Event()
        self._held.set()  # that is: open
        self.holds_bytes = threading.Event()  # since `hold`
        self._refuses = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        if listen is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(listen))
            self.address = str(listen)
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port: int = self._listener.getsockname()[1]
        self._listener.listen(64)
        self._ended = False
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        """Drop into a black hole: no byte passes, no connection ends, new ones are not answered."""
        self.holds_bytes.clear()
        self._held.clear()

    def cut(self) -> None:
        """Break every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def refuse(self) -> None:
        """Break every connection, and each new one at once."""
        self._refuses = True
        self.cut()

    def mend(self) -> None:
        """Carry again."""
        self._refuses = False
        self._held.set()

    def close(self) -> None:
        self._ended = True
        self.mend()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if isinstance(address := getattr(self, "address", None), str):
            os.unlink(address)
        self.cut()

    def _accept(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        self._held.wait()
        if self._refuses:
            near.close()
            return
        far = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
        with near, far, selectors.DefaultSelector() as selector:
            try:
                far.connect(self._target)
            except OSError:
                return
            with self._lock:
                self._pairs.append((near, far))
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            with contextlib.suppress(OSError):
                while True:
                    for key, _ in selector.select():
                        if not self._held.is_set():
                            self.holds_bytes.set()
                        self._held.wait()
                        data = key.fileobj.recv(1 << 16)
                        if not data:
                            return
                        key.data.sendall(data)
