"""The TCP sockets of a process group: those that appeared while it was made. Who is blocked is released by ending them.

Gloo tells nobody which they are. A socket is known by its inode too, since the number of a closed one is used again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

Sockets = set[tuple[int, str]]  # (fd, inode)


class GroupSockets:
    """Of the present generation of a group, and of the store by which its ranks meet. Its owner locks."""

    def __init__(self) -> None:
        self._of_group: Sockets = set()
        self._of_store: Sockets = set()
        self._before_join: Sockets | None = None  # None: the group is not being joined

    @contextmanager
    def of_store(self) -> Iterator[None]:
        """Count the sockets opened in the block as the store's, in place of those before."""
        before = tcp_sockets()
        yield
        self._of_store = tcp_sockets() - before

    def begin_join(self) -> None:
        """The group of another generation is about to be joined."""
        self._of_group = set()
        self._before_join = tcp_sockets()

    def end_join(self) -> None:
        """The group is joined, or could not be."""
        self._before_join = None

    def add_since(self, before: Sockets) -> None:
        """Count the sockets that were not there before as the group's."""
        self._of_group |= tcp_sockets() - before

    def to_release(self) -> Sockets:
        """What keeps the rank in a collective; while the group is joined, also what it waits for the others by."""
        before = self._before_join  # the join may end meanwhile
        if before is None:
            return set(self._of_group)
        return self._of_group | self._of_store | (tcp_sockets() - before)


def tcp_sockets() -> Sockets:
    """The connected TCP sockets of this process; listening ones must never be shut down."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:") and _is_connected_tcp(int(name)):
                found.add((int(name), target))
        except OSError:
            continue
    return found


@contextmanager
def _socket_of(fd: int) -> Iterator[socket.socket]:
    """A socket object for a descriptor of somebody else's, which is left as it is.

    With a default timeout, which a cell may have set, Python would make the descriptor itself non-blocking, and torch
    would take its store for dead.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        sock = socket.socket(fileno=os.dup(fd))
    finally:
        socket.setdefaulttimeout(timeout)
    with sock:
        yield sock


def _is_connected_tcp(fd: int) -> bool:
    with _socket_of(fd) as sock:
        return (
            sock.family in (socket.AF_INET, socket.AF_INET6)
            and sock.type == socket.SOCK_STREAM
            and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )


def shut_down(sockets: Sockets) -> None:
    """End these connections: whoever waits at one gets an error."""
    for fd, inode in sockets:
        try:
            if os.readlink(f"/proc/self/fd/{fd}") == inode:
                with _socket_of(fd) as sock:
                    sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # closed meanwhile: the collective it served has ended
