"""Every change leaves a row in the audit and a Jupyter event."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.storage.server_state import ServerState

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_events import EventLogger

SCHEMA_ID = "https://events.jupyter.org/jupyter_llmcloud/change/v1"
SCHEMA_PATH = Path(__file__).parent / "event_schemas" / "change.yaml"
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
        if event_logger is not None and SCHEMA_ID not in event_logger.schemas:
            event_logger.register_event_schema(SCHEMA_PATH)

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
        if self._events is not None:
            data = {
                "action": action,
                "subject": subject,
                "actor": actor,
                "outcome": outcome,
                "detail": detail,
            }
            try:
                self._events.emit(schema_id=SCHEMA_ID, data=data)
            except Exception:  # what was done must not look refused because nobody could be told
                self._log.exception("no Jupyter event for %s", action)
