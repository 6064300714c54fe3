"""The world's TCPStore: a small process of its own, on a socket that the agent has bound."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.ranks.zygote_client import ZygoteClient
from jupyter_llmcloud.errors import WorldError
from jupyter_llmcloud.protocol.rank_messages import ForkStore
from jupyter_llmcloud.system.spawn import log_tail, open_log

_CLOSED = "the world was ended while it started."
NO_NAMES = {"RES_OPTIONS": "attempts:0"}  # see training.group.no_dns; man 5 resolv.conf


class Store:
    """Forked from the zygote, since a TCPStore needs torch and must not live in a rank."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.address = ""
        self._log = log
        self._control: socket.socket | None = None
        self._answered: asyncio.Future[bytes] | None = None
        self._is_watched = False

    async def start(self, zygote: ZygoteClient, interface: str) -> str:
        """Bind port 0 of `interface`, fork, wait until it answers; returns `host:port`.

        Raises WorldError when it ends instead, or is closed meanwhile.
        """
        self._control, theirs = socket.socketpair()
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        self._answered = asyncio.get_running_loop().create_future()
        try:
            with theirs, socket.socket(family, socket.SOCK_STREAM) as listener:
                listener.bind((interface, 0))
                listener.listen(256)
                host, port = listener.getsockname()[:2]
                with open_log(self._log) as log:
                    request = ForkStore(name=self.name, host=host, port=port, env=NO_NAMES)
                    await zygote.fork(request, [theirs.fileno(), log, log])
                self._hand_over(listener)
            if not await self._answered:
                tail = log_tail(self._log)
                raise WorldError(
                    f"the store by which ranks meet ended at its start. Its last words ({self._log}):\n{tail}"
                )
        except BaseException:
            self.close()
            raise
        self.address = f"{host}:{port}"
        return self.address

    def _hand_over(self, listener: socket.socket) -> None:
        if self._control is None:
            raise WorldError(_CLOSED)
        socket.send_fds(self._control, [b"+"], [listener.fileno()])
        self._control.setblocking(False)
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._hear)
        self._is_watched = True

    def _hear(self) -> None:
        assert self._control is not None and self._answered is not None
        self._forget()
        try:
            said = self._control.recv(1)
        except ConnectionResetError:
            said = b""
        if not self._answered.done():
            self._answered.set_result(said)

    def close(self) -> None:
        """End it, also while it starts."""
        if self._control is None:
            return
        self._forget()
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(WorldError(_CLOSED))
            self._answered.exception()  # seen: nobody need wait for it
        self._control.close()
        self._control = None

    def _forget(self) -> None:
        """Have the loop forget the socket: the next one may get its number, and the loop would never wake that one."""
        if self._is_watched:
            assert self._control is not None
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._is_watched = False


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
