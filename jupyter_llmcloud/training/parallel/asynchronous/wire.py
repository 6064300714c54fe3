"""Messages between a worker and a parameter server: a header of plain values, and raw bytes.

A connection of its own, beside the process group: a worker that is gone closes it, which breaks nothing of the others,
and a Stop interrupts who waits at it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import weakref
from typing import Any

import torch

_LENGTHS = struct.Struct(">IQ")
_MOST_BEFORE_GREETING = 1 << 12  # bytes taken from somebody who has not shown the token yet
_MOST_HEADER = 1 << 16
_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children() -> None:
    """What this process forks (workers of its loaders) keeps no connection of its own open. Called once."""
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for sock in list(_open):
        sock.close()


def note_open(sock: socket.socket) -> socket.socket:
    """A socket that children are not to have."""
    _open.add(sock)
    return sock


class ServerGone(torch.distributed.DistNetworkError):
    """The other end has closed its connection; an echo of what has happened there."""


class Wire:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = note_open(sock)
        self._is_trusted = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that has lost its power closes nothing

    def trust(self) -> None:
        """The other end has shown that it belongs to the world: long messages are taken from it."""
        self._is_trusted = True

    def send(self, header: dict[str, Any], payload: Any = b"") -> None:
        """Send a message. Raises ServerGone."""
        text, body = json.dumps(header).encode(), memoryview(payload).cast("B")
        try:
            self._sock.sendall(_LENGTHS.pack(len(text), len(body)) + text)
            if len(body):
                self._sock.sendall(body)
        except OSError as error:
            raise ServerGone(f"connection closed by the other end of --plan async-ps ({error})") from error

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        """Wait for a message. Raises ServerGone."""
        header_size, size = _LENGTHS.unpack(self._exactly(_LENGTHS.size))
        if header_size > _MOST_HEADER or (not self._is_trusted and header_size + size > _MOST_BEFORE_GREETING):
            raise ServerGone("connection closed: this is no message of --plan async-ps")
        header: dict[str, Any] = json.loads(self._exactly(header_size))
        return header, self._exactly(size)

    def _exactly(self, size: int) -> bytearray:
        found, at = bytearray(size), 0
        view = memoryview(found)
        while at < size:
            try:
                count = self._sock.recv_into(view[at:])
            except OSError as error:
                raise ServerGone(f"connection closed by the other end of --plan async-ps ({error})") from error
            if not count:
                raise ServerGone("connection closed by the other end of --plan async-ps")
            at += count
        return found

    @property
    def is_closed(self) -> bool:
        """Whether the other end has gone, asked without waiting while no message of it is under way."""
        try:
            incoming = select.poll()
            incoming.register(self._sock, select.POLLIN)
            return bool(incoming.poll(0)) and not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """Let go of it."""
        self._sock.close()


def as_bytes(values: torch.Tensor) -> memoryview:
    """The memory of a tensor on the CPU, of any type; it must stay as it is until that is sent."""
    flat = values.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def as_tensor(data: bytearray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The tensor that these bytes are."""
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
