"""Watches what endpoints have answered, and tells what is wrong: audit, log, a counter of /metrics, and the sinks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter

from jupyter_llmcloud.core.detect.detector import Alert
from jupyter_llmcloud.core.detect.endpoint_detectors import CLIENT_GONE, AnsweredRequest, EndpointDetectors
from jupyter_llmcloud.server.gateway.metrics import endpoint_label
from jupyter_llmcloud.storage.server_state import RowRecord
from jupyter_llmcloud.system.alert_sinks import alert_sender

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.audit import Audit
    from jupyter_llmcloud.storage.server_state import RequestRecord

MAX_ENDPOINTS = 1000
ALERT = "endpoint.alert"
ALERTS = Counter("llmcloud_endpoint_alerts_total", "What detectors found at endpoints", ["endpoint", "detector"])
_NOT_ITS_FAULT = ("hung up", "key revoked", "server restarting")


class EndpointMonitor:
    """All endpoints of a server. Kept in memory: after a restart it learns anew what is usual."""

    def __init__(self, audit: Audit, log: Logger) -> None:
        self._audit = audit
        self._log = log
        self._endpoints: dict[str, EndpointDetectors] = {}

    def answered(self, records: Sequence[RequestRecord]) -> None:
        """Requests to endpoints have ended."""
        for record in records:
            is_answer = record.status < 400 or record.status >= 500  # what is refused may name any endpoint
            if is_answer and (detectors := self._of(record.endpoint)) is not None:
                for alert in detectors.answered(_seen(record)):
                    self._tell(record.endpoint, alert)

    def _of(self, endpoint: str) -> EndpointDetectors | None:
        if endpoint not in self._endpoints and len(self._endpoints) < MAX_ENDPOINTS:
            self._endpoints[endpoint] = EndpointDetectors()
        return self._endpoints.get(endpoint)

    def _tell(self, endpoint: str, alert: Alert) -> None:
        ALERTS.labels(endpoint_label(endpoint), alert.detector).inc()
        self._log.warning("endpoint %s: %s: %s (%s)", endpoint, alert.detector, alert.text, alert.evidence)
        self._audit.tell("server", ALERT, endpoint, detector=alert.detector, what=alert.text, evidence=alert.evidence)
        told: dict[str, Any] = {
            "text": f"endpoint {endpoint}: {alert.detector}: {alert.text}",
            "detector": alert.detector,
            "endpoint": endpoint,
            "evidence": alert.evidence,
            "t": round(time.time(), 3),
        }
        try:
            alert_sender().send(told, self._log.warning)
        except ValueError as error:
            self._log.warning("alerts of endpoints are told here alone: %s", error)


def _seen(record: RequestRecord) -> AnsweredRequest:
    is_whole = record.outcome in ("done", "cached") or record.status >= 400
    status = CLIENT_GONE if record.outcome in _NOT_ITS_FAULT else record.status
    # Rows of a batch take the room that the replicas have, and nobody waits for one of them.
    tells_latency = record.outcome != "cached" and not isinstance(record, RowRecord)
    first_byte_s = record.first_byte_s if tells_latency else None
    return AnsweredRequest(status, is_whole, first_byte_s, record.prompt_tokens or None)
