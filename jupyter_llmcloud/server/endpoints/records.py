"""What a server keeps of its endpoints. Saving never stands in the way: what cannot be saved now is saved later."""

from __future__ import annotations

import asyncio
import copy
import sqlite3
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.storage.models.unneeded import remove_unneeded
from jupyter_llmcloud.storage.server_state import ServerState, StoredEndpoint

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.audit import Audit

RETRY_S = 1.0


class EndpointRecords:
    """The rows of one server's endpoints. A full disk delays them, and is told in the log."""

    def __init__(self, state: ServerState, audit: Audit, server_id: str, log: Logger) -> None:
        self._state = state
        self._audit = audit
        self._server_id = server_id
        self._log = log
        self._unsaved: dict[str, StoredEndpoint | None] = {}  # None: to be deleted
        self._retrying: asyncio.Task[None] | None = None

    def load(self) -> list[StoredEndpoint]:
        """Those that this server has, also from the servers before it."""
        return self._state.endpoints(self._server_id)

    def save(self, endpoint: StoredEndpoint) -> None:
        """Keep an endpoint as it is now."""
        self._unsaved[endpoint.name] = copy.deepcopy(endpoint)
        self._write_or_retry()

    def delete(self, name: str) -> None:
        """Keep an endpoint no longer."""
        self._unsaved[name] = None
        self._write_or_retry()

    def remove_unneeded(self) -> None:
        """Remove what was kept for revisions that nobody serves any more, nor could go back to."""
        try:
            unsaved = [endpoint for endpoint in self._unsaved.values() if endpoint is not None]
            needed = self._state.served_paths().union(*(endpoint.paths() for endpoint in unsaved))
        except sqlite3.Error as error:
            self._log.warning("what is served no more is not removed yet: %s", error)
            return
        for folder in remove_unneeded(needed):
            self._log.info("removed %s: no endpoint needs it", folder)

    def tell(self, name: str, state: str, reason: str) -> None:
        """An endpoint has come into another state."""
        self._audit.tell("server", "endpoint.state", name, state=state, reason=reason)

    def tell_change(self, name: str, action: str, **detail: Any) -> None:
        """An endpoint has changed something by itself."""
        self._audit.tell("server", action, name, **detail)

    def _write_or_retry(self) -> None:
        if self._retrying is not None and not self._retrying.done():
            return  # which writes the newest of each
        try:
            self._write()
        except sqlite3.Error as error:
            self._log.error("endpoints are not saved yet, and will be as soon as this is possible: %s", error)
            self._retrying = asyncio.ensure_future(self._retry())

    def _write(self) -> None:
        for name, endpoint in list(self._unsaved.items()):
            if endpoint is None:
                self._state.delete_endpoint(self._server_id, name)
            else:
                self._state.save_endpoint(self._server_id, endpoint)
            del self._unsaved[name]

    async def _retry(self) -> None:
        while self._unsaved:
            await asyncio.sleep(RETRY_S)
            try:
                self._write()
            except sqlite3.Error:
                continue  # it was said already
        self._log.info("endpoints are saved again")

    def close(self) -> None:
        """The server ends: a last attempt."""
        if self._retrying is not None:
            self._retrying.cancel()
        try:
            self._write()
        except sqlite3.Error as error:
            self._log.error("endpoints %s could not be saved: %s", ", ".join(self._unsaved), error)
