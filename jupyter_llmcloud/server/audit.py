"""Each change leaves a row in the audit and a Jupyter event; each request to an endpoint one of usage and an event."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.storage.server_state import ServerState

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_events import EventLogger

    from jupyter_llmcloud.storage.server_state import RequestRecord

SCHEMA_ID = "https://events.jupyter.org/jupyter_llmcloud/change/v1"
REQUESTS_ID = "https://events.jupyter.org/jupyter_llmcloud/requests/v1"
_SCHEMAS = {SCHEMA_ID: "change.yaml", REQUESTS_ID: "requests.yaml"}
_FOLDER = Path(__file__).parent / "event_schemas"
MAX_TOLD = 200  # requests in one event
MAX_UNWRITTEN = 10_000


class Audit:
    """Where changes are told: kept in the database, and emitted for whoever listens.

    What was done is done, also when it cannot be written down: then it is logged, and written with what comes next.
    """

    def __init__(self, state: ServerState, event_logger: EventLogger | None, log: Logger) -> None:
        self._state = state
        self._events = event_logger
        self._log = log
        self._listeners: list[Callable[[str], None]] = []
        self._unwritten: deque[tuple[str, str, str, str, dict[str, Any]]] = deque(maxlen=MAX_UNWRITTEN)
        for schema_id, file in _SCHEMAS.items():
            if event_logger is not None and schema_id not in event_logger.schemas:
                event_logger.register_event_schema(_FOLDER / file)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have this called with every action, when it was carried out."""
        self._listeners.append(listener)

    def tell(self, actor: str, action: str, subject: str, outcome: str = "done", **detail: Any) -> None:
        """Something was changed, or refused (`outcome` is then the name of the error)."""
        self._unwritten.append((actor, action, subject, outcome, detail))
        try:
            while self._unwritten:
                self._state.add_audit(*self._unwritten[0])
                self._unwritten.popleft()
        except sqlite3.Error as error:
            self._log.error(
                "the audit cannot be written (%s): %s did %s to %s: %s", error, actor, action, subject, outcome
            )
        for listener in self._listeners:
            listener(action)
        data = {"action": action, "subject": subject, "actor": actor, "outcome": outcome, "detail": detail}
        self._emit(SCHEMA_ID, data)

    def tell_requests(self, records: Sequence[RequestRecord]) -> None:
        """Requests to endpoints have ended, and their rows are written."""
        for first in range(0, len(records), MAX_TOLD):
            rows = [dict(vars(record)) for record in records[first : first + MAX_TOLD]]
            self._emit(REQUESTS_ID, {"requests": rows})

    def _emit(self, schema_id: str, data: dict[str, Any]) -> None:
        """For whoever listens; nothing is done when nobody does."""
        if self._events is None:
            return
        try:
            self._events.emit(schema_id=schema_id, data=data)
        except Exception:  # what was done must not look refused because nobody could be told
            self._log.exception("no Jupyter event: %s", schema_id)
