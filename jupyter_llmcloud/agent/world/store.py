"""The world's TCPStore: a small process of its own, on a socket that the agent has bound."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.protocol.rank_messages import ForkStore
from jupyter_llmcloud.system.spawn import open_log

NO_NAMES = {"RES_OPTIONS": "attempts:0"}  # see training.no_names; man 5 resolv.conf


class Store:
    """Forked from the zygote, since a TCPStore needs torch and must not live in a rank."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.address = ""
        self._log = log
        self._control: socket.socket | None = None

    async def start(self, zygote: ZygoteClient, interface: str) -> str:
        """Bind port 0 of `interface`, fork, wait until it answers; returns `host:port`."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((interface, 0))
            listener.listen(256)
            host, port = listener.getsockname()
            ours, theirs = socket.socketpair()
            with theirs, open_log(self._log) as log:
                request = ForkStore(name=self.name, host=host, port=port, env=NO_NAMES)
                await zygote.fork(request, [theirs.fileno(), log, log])
                socket.send_fds(ours, [b"+"], [listener.fileno()])
        ours.setblocking(False)
        self._control = ours
        await asyncio.get_running_loop().sock_recv(ours, 1)
        self.address = f"{host}:{port}"
        return self.address

    def close(self) -> None:
        """End it."""
        if self._control is not None:
            self._control.close()
            self._control = None
