"""A Dask cluster whose workers only its scheduler reaches, as behind a login node or in a cluster of containers.

Each worker is known by the address of a TCP proxy in the scheduler's process, which turns away every peer that is not
of that process: a real refused connection for clients and for the other workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sys
from typing import Any

import dask
import psutil
from distributed import LocalCluster, Security


class FarCluster(LocalCluster):
    """With TLS unless `secure` is false; proxies run in the loop of the cluster."""

    def __init__(self, n_workers: int = 1, secure: bool = True, **options: Any) -> None:
        security = Security.temporary() if secure else None
        super().__init__(
            n_workers=n_workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            security=security,
            protocol="tls://" if secure else "tcp://",
            **options,
        )
        self._proxies: list[asyncio.Server] = []
        self._listeners: dict[int, socket.socket] = {}  # by the worker's own port
        for name, spec in self.worker_spec.items():
            port, proxy = _free_port(), _listening()
            self._listeners[port] = proxy
            contact = f"{'tls' if secure else 'tcp'}://127.0.0.1:{proxy.getsockname()[1]}"
            options = {**spec["options"], "worker_port": port, "contact_address": contact}
            self.worker_spec[name] = {**spec, "options": options}

    async def _start(self) -> None:
        for port, listener in self._listeners.items():
            self._proxies.append(await asyncio.start_server(functools.partial(_carry, port), sock=listener))
        await super()._start()

    async def _close(self) -> None:
        await super()._close()
        for proxy in self._proxies:
            proxy.close()


def _listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def _free_port() -> int:
    with _listening() as listener:
        return int(listener.getsockname()[1])


async def _carry(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("peername")
    if peer not in {tuple(row.laddr) for row in psutil.Process().net_connections("tcp") if row.laddr}:
        writer.transport.abort()
        return
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))


async def _hold(secure: bool) -> None:
    async with FarCluster(n_workers=1, secure=secure, asynchronous=True) as cluster:
        print(cluster.scheduler_address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":  # until its standard input is closed
    dask.config.set({"distributed.worker.daemon": False})
    asyncio.run(_hold("--secure" in sys.argv))
