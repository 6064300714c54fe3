"""Reaching an agent on another host: a local unix socket whose bytes travel through Dask's own TLS connections.

On the same host everybody speaks to an agent's unix socket directly. Elsewhere only Dask's ports may be open, so a
`Bridge` listens on a unix socket here and carries each connection over a Dask comm to the worker beside the agent,
whose plugin passes it on to the agent's socket (or to one of its replicas'). Who connects cannot tell the difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from pathlib import Path

from jupyter_llmcloud.cluster.tunnel.pump import carry
from jupyter_llmcloud.cluster.tunnel.relay import SocketRoutes
from jupyter_llmcloud.errors import ConnectionLost, NotFound
from jupyter_llmcloud.protocol.connection import AGENT_SOCKET, bridge_name
from jupyter_llmcloud.protocol.frames import encode
from jupyter_llmcloud.protocol.rpc import refusal
from jupyter_llmcloud.system import unix_sockets
from jupyter_llmcloud.system.atomic_files import write_json


class Bridge:
    """A unix socket on this host that stands for `target`, a socket beside the worker `name`, now at `worker`."""

    def __init__(self, path: Path, routes: SocketRoutes, worker: str, name: str, target: str) -> None:
        self.path = str(path)
        self.worker = worker
        self.name = name
        self.target = target
        self._routes = routes
        self._server: asyncio.Server | None = None
        self._carried: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await unix_sockets.listen(self.path, self._carry)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carried.add(task)
        try:
            comm, self.worker = await self._routes.open(self.worker, self.name, self.target)
            await carry(comm, reader, writer)
        except (ConnectionLost, NotFound) as error:
            if Path(self.target).name == AGENT_SOCKET:
                writer.write(encode(refusal(error)))
        except (OSError, asyncio.CancelledError):
            pass  # whoever is connected here sees the end of the stream
        finally:
            self._carried.discard(task)
            writer.close()

    def close(self) -> None:
        """Listen no more, and end what is carried."""
        if self._server is not None:
            self._server.close()
        for task in self._carried:
            task.cancel()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class Bridges:
    """The bridges of one process to the workers of a cluster; those of an earlier process are found again.

    Args:
        folder: where their sockets are; `bridges.json` there tells of them.
    """

    def __init__(self, folder: Path, routes: SocketRoutes) -> None:
        self._folder = folder
        self._routes = routes
        self._bridges: dict[str, Bridge] = {}
        self._starting = asyncio.Lock()

    async def restore(self) -> None:
        """Stand again where an earlier process stood: who knows the path of a socket need not ask again."""
        with contextlib.suppress(OSError, ValueError):
            for row in json.loads((self._folder / "bridges.json").read_text()):
                await self.reach(row["worker"], row["name"], row["target"])

    async def reach(self, worker: str, name: str, target: str) -> str:
        """The path of the socket here that stands for `target` beside a worker."""
        async with self._starting:
            bridge = self._bridges.get(target)
            if bridge is None:
                bridge = Bridge(self._folder / bridge_name(target), self._routes, worker, name, target)
                await bridge.start()
                self._bridges[target] = bridge
                self._save()
        bridge.worker = worker
        return bridge.path

    def _save(self) -> None:
        rows = [{"worker": b.worker, "name": b.name, "target": b.target} for b in self._bridges.values()]
        write_json(self._folder / "bridges.json", rows, durable=False)  # of sockets of this host as it runs now

    def close(self) -> None:
        """Listen no more; a next process may stand here again."""
        for bridge in self._bridges.values():
            bridge.close()
        self._bridges.clear()


def has_bridges(folder: Path) -> bool:
    """Whether a process has left word of bridges there."""
    return (folder / "bridges.json").exists()


def is_here(host: str, target: str) -> bool:
    """Whether a socket of that host is one of this host: names are not always unique."""
    return host == socket.gethostname() and os.path.exists(target)
