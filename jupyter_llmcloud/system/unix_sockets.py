"""Unix sockets that nobody but this user can connect to, from their first moment on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Awaitable, Callable

PRIVATE = 0o600
Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def bind(path: str, *, mode: int = PRIVATE, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A socket that is bound to `path`, in place of one that a process before has left there.

    Raises OSError: also when something is there that is no socket, which is never removed.
    """
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, kind)
    mask = os.umask(0o777 & ~mode)  # of the whole process: nothing is awaited until it is what it was
    try:
        listener.bind(path)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


async def listen(path: str, connected: Connected, *, limit: int = 1 << 16, mode: int = PRIVATE) -> asyncio.Server:
    """Serve whoever connects to `path`; `limit` is how many bytes are read ahead. Raises OSError, as `bind`."""
    return await asyncio.start_unix_server(connected, sock=bind(path, mode=mode), limit=limit)
