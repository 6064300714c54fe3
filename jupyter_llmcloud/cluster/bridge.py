"""Reaching an agent on another host: a local unix socket whose bytes travel through Dask's own TLS connection.

On the same host everybody speaks to an agent's unix socket directly. Elsewhere only Dask's ports may be open, so a
`Bridge` listens on a unix socket here and carries each connection over a Dask comm to the worker beside the agent,
whose plugin passes it on to the agent's socket (or to one of its replicas'). Who connects cannot tell the difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from distributed.comm import connect
from distributed.comm.core import Comm, CommClosedError
from distributed.core import Status

TUNNEL = "llmcloud_tunnel"  # the operation that a worker's plugin answers
_CHUNK = 1 << 18


class Bridge:
    """A unix socket on this host that stands for `target`, a socket beside the worker at `worker`."""

    def __init__(self, folder: Path, worker: str, target: str, connection_args: dict[str, Any]) -> None:
        digest = hashlib.sha256(f"{worker} {target}".encode()).hexdigest()[:12]
        self.path = str(folder / f"b{digest}.sock")
        self._worker = worker
        self._target = target
        self._connection_args = connection_args
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen; returns the path of the socket."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._carry, self.path)
        finally:
            os.umask(mask)
        return self.path

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            comm = await connect(self._worker, **self._connection_args)
            await comm.write({"op": TUNNEL, "target": self._target, "reply": False})
            await carry(comm, reader, writer)
        except OSError:
            pass  # whoever is connected here sees the end of the stream
        finally:
            writer.close()

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


async def answer_tunnel(comm: Comm, folder: Path, target: str) -> Status:
    """The worker's end: pass a comm on to a socket in the agent's own folder."""
    path = (folder / Path(target).name).resolve()
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        comm.abort()
        return Status.dont_reply
    try:
        await carry(comm, reader, writer)
    finally:
        writer.close()
    return Status.dont_reply


async def carry(comm: Comm, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes both ways until either end closes."""

    async def outwards() -> None:
        while data := await reader.read(_CHUNK):
            await comm.write(data)

    async def inwards() -> None:
        while True:
            writer.write(await comm.read())
            await writer.drain()

    ways = [asyncio.create_task(outwards()), asyncio.create_task(inwards())]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        for outcome in await asyncio.gather(*ways, return_exceptions=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, OSError | CommClosedError):
                raise outcome
        comm.abort()
