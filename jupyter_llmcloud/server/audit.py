"""Every change leaves a row in the audit and a Jupyter event."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.storage.server_state import ServerState

if TYPE_CHECKING:
    from jupyter_events import EventLogger

SCHEMA_ID = "https://events.jupyter.org/jupyter_llmcloud/change/v1"
SCHEMA_PATH = Path(__file__).parent / "event_schemas" / "change.yaml"


class Audit:
    """Where changes are told: kept in the database, and emitted for whoever listens."""

    def __init__(self, state: ServerState, event_logger: EventLogger | None) -> None:
        self._state = state
        self._events = event_logger
        if event_logger is not None and SCHEMA_ID not in event_logger.schemas:
            event_logger.register_event_schema(SCHEMA_PATH)

    def tell(self, actor: str, action: str, subject: str, outcome: str = "done", **detail: Any) -> None:
        """Something was changed, or refused (`outcome` is then the name of the error)."""
        self._state.add_audit(actor, action, subject, outcome, detail)
        if self._events is not None:
            data = {
                "action": action,
                "subject": subject,
                "actor": actor,
                "outcome": outcome,
                "detail": detail,
            }
            self._events.emit(schema_id=SCHEMA_ID, data=data)
