"""How a server reaches the agents of its clusters: by their own sockets on this host, by bridges to other hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed import Security

from jupyter_llmcloud.cluster.host import security_from
from jupyter_llmcloud.cluster.kinds.gateway import learn_scheme
from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.cluster.tunnel.bridge import Bridges, has_bridges, is_here
from jupyter_llmcloud.cluster.tunnel.relay import SocketRoutes


class AgentSockets:
    """The bridges of one server.

    Args:
        record: a cluster's record as it is now: a scheduler that was replaced has another address and other keys.
        always_tunnel: use bridges also on this host.
    """

    def __init__(self, record: Callable[[str], ClusterRecord], always_tunnel: bool) -> None:
        self.always_tunnel = always_tunnel
        self._record = record
        self._bridges: dict[str, Bridges] = {}

    async def to(self, record: ClusterRecord, info: dict[str, Any], target: str) -> str:
        """A socket on this host for the socket `target` beside an agent: itself, or a bridge to it."""
        if is_here(info["host"], target) and not self.always_tunnel:
            return target
        return await self._of(record).reach(info["worker"], info["name"], target)

    async def restore(self, record: ClusterRecord) -> None:
        """Stand where the server before this one stood for agents on other hosts."""
        if has_bridges(record.folder):
            await self._of(record).restore()

    def _of(self, record: ClusterRecord) -> Bridges:
        name = record.name
        if name not in self._bridges:

            def connection_args() -> dict[str, Any]:
                known = self._record(name)
                learn_scheme(known.address)
                security = security_from(known.tls) or Security()
                return security.get_connection_args("client")

            self._bridges[name] = Bridges(
                record.folder, SocketRoutes(lambda: self._record(name).address, connection_args)
            )
        return self._bridges[name]

    def forget(self, name: str) -> None:
        """The cluster has ended."""
        if bridges := self._bridges.pop(name, None):
            bridges.close()

    def release(self) -> None:
        """Another server may stand here."""
        for name in list(self._bridges):
            self.forget(name)
