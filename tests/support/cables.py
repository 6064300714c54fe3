"""A socket that stands for an agent's and can be cut, for tests."""

from __future__ import annotations

import os
import select
import socket
import threading
from pathlib import Path

from tests.support.worlds import until


class Cable:
    """A socket that stands for an agent's, as a bridge does; it can be cut, and it can swallow what it should carry."""

    def __init__(self, target: str, folder: Path) -> None:
        self.path = str(folder / "cable.sock")
        self.dropping = False
        self._target = target
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._cut = self._ended = False
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()
        self.mend()

    def cut(self) -> None:
        """Nobody can connect, and what was connected is not."""
        self._cut = True
        until(lambda: self._listener is None and not self._pairs, "the cable is cut")

    def mend(self) -> None:
        self._cut = False
        until(lambda: self._listener is not None, "the cable is mended")

    def __enter__(self) -> Cable:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._ended = True
        self._thread.join()

    def _carry(self) -> None:
        while not self._ended:
            if self._cut and self._listener is not None:
                self._stop_listening()
            elif not self._cut and self._listener is None:
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(self.path)
                listener.listen()
                self._listener = listener
            self._turn()
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            os.unlink(self.path)
        for near, _ in list(self._pairs):
            self._drop(near)
        self._listener = None

    def _turn(self) -> None:
        others = {one: other for pair in self._pairs for one, other in (pair, pair[::-1])}
        waiting = [self._listener] if self._listener is not None else []
        for sock in select.select([*others, *waiting], [], [], 0.02)[0]:
            try:
                if sock is self._listener:
                    self._connect(sock.accept()[0])
                elif sock.fileno() >= 0:
                    self._pass_on(sock, others[sock])
            except OSError:
                self._drop(sock)

    def _connect(self, near: socket.socket) -> None:
        far = socket.socket(socket.AF_UNIX)
        far.connect(self._target)
        self._pairs.append((near, far))

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        data = source.recv(1 << 16)
        if not data:
            self._drop(source)
        elif not self.dropping:
            target.sendall(data)

    def _drop(self, sock: socket.socket) -> None:
        for pair in [pair for pair in self._pairs if sock in pair]:
            self._pairs.remove(pair)
            for end in pair:
                end.close()
