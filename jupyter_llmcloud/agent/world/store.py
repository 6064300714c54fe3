"""The world's TCPStore: a small process of its own, on a socket that the agent has bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.errors import WorldError
from jupyter_llmcloud.protocol.rank_messages import ForkStore
from jupyter_llmcloud.system.spawn import last_words, open_log

NO_NAMES = {"RES_OPTIONS": "attempts:0"}  # see training.group.no_dns; man 5 resolv.conf


class Store:
    """Forked from the zygote, since a TCPStore needs torch and must not live in a rank."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.address = ""
        self._log = log
        self._control: socket.socket | None = None

    async def start(self, zygote: ZygoteClient, interface: str) -> str:
        """Bind port 0 of `interface`, fork, wait until it answers; returns `host:port`.

        Raises WorldError when it ends instead.
        """
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
        await self._answered(ours)
        self.address = f"{host}:{port}"
        return self.address

    async def _answered(self, control: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError):
            if await asyncio.get_running_loop().sock_recv(control, 1):
                return
        words = last_words(self._log)
        raise WorldError(f"the store by which ranks meet ended at its start. Its last words ({self._log}):\n{words}")

    def close(self) -> None:
        """End it."""
        if self._control is not None:
            self._control.close()
            self._control = None


class Stores:
    """The stores of the worlds that are led from here.

    Args:
        log: file for what the stores themselves print.
        interface: address on which ranks of other hosts reach a store.
    """

    def __init__(self, zygote: ZygoteClient, log: Path, interface: str) -> None:
        self._zygote = zygote
        self._log = log
        self._interface = interface
        self._stores: dict[str, Store] = {}  # by world
        self._ended: set[str] = set()  # names of those whose process has gone
        self._num_started = 0

    async def start(self, world_id: str, allocations: Sequence[Mapping[str, Any]]) -> str:
        """Start the store of a world, on loopback unless ranks on other hosts must reach it; returns `host:port`."""
        self._num_started += 1
        store = Store(f"{world_id}/store{self._num_started}", self._log)
        self._stores[world_id] = store
        return await store.start(self._zygote, self._interface if is_elsewhere(allocations) else "127.0.0.1")

    def is_alive(self, world_id: str) -> bool:
        """Whether the process of a world's store is there."""
        store = self._stores.get(world_id)
        return store is not None and store.name not in self._ended

    def exited(self, name: str) -> bool:
        """A forked process has ended; returns whether it was a store."""
        if any(store.name == name for store in self._stores.values()):
            self._ended.add(name)
            return True
        return False

    def end(self, world_id: str) -> None:
        """The world needs it no more."""
        if store := self._stores.pop(world_id, None):
            store.close()
            self._ended.discard(store.name)


def is_elsewhere(allocations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some of these ranks are on another host."""
    return any(allocation.get("host") not in (None, socket.gethostname()) for allocation in allocations)
