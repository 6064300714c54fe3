"""What the server tells of an endpoint whose requests begin to fail: audit, /metrics and the sinks of alerts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from jupyter_llmcloud.server.audit import Audit
from jupyter_llmcloud.server.endpoints import alerts
from jupyter_llmcloud.server.endpoints.alerts import EndpointMonitor
from jupyter_llmcloud.storage.server_state import RequestRecord, ServerState


class Sent:
    """Keeps what would have been sent."""

    def __init__(self) -> None:
        self.told: list[dict[str, object]] = []

    def send(self, alert: dict[str, object], failed: object) -> None:
        self.told.append(alert)


def record(status: int = 200, outcome: str = "done", endpoint: str = "gpt") -> RequestRecord:
    return RequestRecord("r", "key:a", endpoint, "completions", status, 0.5, first_byte_s=0.1, outcome=outcome)


def test_an_endpoint_that_begins_to_fail_is_told_everywhere_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, state = Sent(), ServerState(tmp_path / "server.sqlite")
    monkeypatch.setattr(alerts, "alert_sender", lambda: sent)
    monitor = EndpointMonitor(Audit(state, None, logging.getLogger()), logging.getLogger())
    monitor.answered([record()] * 100)
    monitor.answered([record(outcome="hung up"), record(404), record(429)] * 20)  # none of it its fault
    assert not sent.told
    monitor.answered([record(500), record(outcome="replica_lost")] * 10)
    [alert] = sent.told
    assert (alert["endpoint"], alert["detector"]) == ("gpt", "errors")
    assert "of its last 50 requests failed" in str(alert["text"])
    [row] = state.audit(action="endpoint.alert")
    assert row["subject"] == "gpt" and row["detail"]["detector"] == "errors"
    labels = {"endpoint": "gpt", "detector": "errors"}
    assert REGISTRY.get_sample_value("llmcloud_endpoint_alerts_total", labels) == 1
