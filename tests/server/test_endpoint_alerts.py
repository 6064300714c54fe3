"""What the server tells of an endpoint whose requests begin to fail: audit, /metrics and the sinks of alerts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from jupyter_llmcloud.core.detect import endpoint_detectors
from jupyter_llmcloud.server.audit import Audit
from jupyter_llmcloud.server.endpoints import alerts
from jupyter_llmcloud.server.endpoints.alerts import EndpointMonitor
from jupyter_llmcloud.storage.server_state import RequestRecord, RowRecord, ServerState
from tests.support.server_parts import Server, make_model

pytest_plugins = ["tests.support.server_fixtures"]


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


def test_a_data_set_that_an_endpoint_works_through_is_no_slowness_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, state = Sent(), ServerState(tmp_path / "server.sqlite")
    monkeypatch.setattr(alerts, "alert_sender", lambda: sent)
    monitor = EndpointMonitor(Audit(state, None, logging.getLogger()), logging.getLogger())
    monitor.answered([record()] * 300)
    late = replace(record(), first_byte_s=2.0)
    rows = [RowRecord(**vars(late))] * 100
    state.add_usage(list(rows))
    monitor.answered(rows)
    assert not sent.told
    monitor.answered([late] * 50)  # while the same of those who wait for an answer is told
    assert [alert["detector"] for alert in sent.told] == ["latency"]


async def test_an_endpoint_that_answers_late_and_then_fails_is_told_of_what_its_gateway_has_seen(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = Sent()
    monkeypatch.setattr(alerts, "alert_sender", lambda: sent)
    monkeypatch.setattr(endpoint_detectors, "RECENT", 10)
    monkeypatch.setattr(endpoint_detectors, "MIN_USUAL", 20)
    model = make_model(tmp_path / "watched")
    await server.serve(model, name="watched")
    key = await server.key("infer:watched")

    async def answers(prompt: str, times: int) -> set[int]:
        found = {(await server.complete(prompt, key, model="watched")).status_code for _ in range(times)}
        await server.context.requests.write()
        return found

    assert await answers("hello", 30) == {200} and not sent.told
    assert await answers("slow 300", 10) == {200}
    assert [(alert["endpoint"], alert["detector"]) for alert in sent.told] == [("watched", "latency")]
    (model / "failing").touch()
    assert await answers("hello", 10) == {500}
    assert [alert["detector"] for alert in sent.told] == ["latency", "errors"]
    rows = server.context.state.audit(action="endpoint.alert")
    assert {row["detail"]["detector"] for row in rows if row["subject"] == "watched"} == {"latency", "errors"}
    text = (await server.ask("GET", "metrics")).text
    assert 'llmcloud_endpoint_alerts_total{detector="latency",endpoint="watched"} 1.0' in text
