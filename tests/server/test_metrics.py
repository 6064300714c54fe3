"""What `/metrics` tells of endpoints, and the traces of requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.server.answers.copied_answers import CACHE
from jupyter_llmcloud.server.answers.response_cache import CachedAnswer
from jupyter_llmcloud.server.gateway import metrics, tracing
from jupyter_llmcloud.server.gateway.tracing import RequestTrace, trace_context
from jupyter_llmcloud.storage.server_state import RequestRecord
from tests.support.server_parts import Server, until

pytest_plugins = ["tests.support.server_fixtures"]
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def scraped(server: Server) -> dict[str, float]:
    """The samples of ours, by their names with labels."""
    text = (await server.ask("GET", "metrics")).text
    rows = (line.rpartition(" ") for line in text.splitlines() if line.startswith("llmcloud_"))
    return {name: float(value) for name, _, value in rows}


async def test_a_stream_and_an_error_are_seen_in_jupyters_metrics(server: Server, model: Path) -> None:
    await server.serve(model, "seen", max_model_len=64)
    key = await server.key("infer:seen")
    async with stream_of(server, "count 5", key) as answer:
        await answer.aread()
    await server.complete("busy", key, model="seen")
    await server.context.requests.write()
    told = await scraped(server)
    label = 'endpoint="seen"'
    assert told[f"llmcloud_time_to_first_token_seconds_count{{{label}}}"] == 1
    assert told[f"llmcloud_inter_token_seconds_count{{{label}}}"] >= 3
    assert 0.005 < told[f"llmcloud_inter_token_seconds_sum{{{label}}}"] < 5
    assert told[f"llmcloud_queue_wait_seconds_count{{{label}}}"] == 2
    assert told[f'llmcloud_tokens_total{{{label},kind="prompt"}}'] == 3
    assert told[f'llmcloud_tokens_total{{{label},kind="generated"}}'] == 5
    assert told[f'llmcloud_errors_total{{{label},error="service_unavailable_error"}}'] == 1
    assert told[f'llmcloud_requests_total{{{label},route="completions",status="200"}}'] == 1
    assert told[f'llmcloud_replicas{{{label},state="ready"}}'] == 1
    assert told[f'llmcloud_kv_cache_bytes{{{label},kind="used"}}'] == 64 << 20
    assert told[f'llmcloud_kv_cache_bytes{{{label},kind="max"}}'] == 5 << 30
    assert told[f"llmcloud_requests_waiting{{{label}}}"] == 0
    await server.ask("DELETE", "llmcloud/api/endpoints/seen")
    await until(lambda: _gone(server, label), "a stopped endpoint has no replicas")


async def _gone(server: Server, label: str) -> bool:
    return not any(name.startswith("llmcloud_replicas{") and label in name for name in await scraped(server))


def stream_of(server: Server, prompt: str, key: str) -> Any:
    body = {"model": "seen", "prompt": prompt, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    return server.client.stream("POST", f"{server.url}/llmcloud/v1/completions", json=body, headers=headers)


async def test_what_is_asked_for_makes_no_labels(server: Server, model: Path) -> None:
    await server.serve(model)
    for number in range(30):
        await server.complete("hello", model=f"made-up-{number}")
    assert "made-up" not in (await server.ask("GET", "metrics")).text


def test_the_number_of_labels_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_known", set())
    labels = {metrics.endpoint_label(f"e{number}") for number in range(1000)}
    assert len(labels) == metrics.MAX_ENDPOINTS + 1 and metrics.OTHER in labels
    assert metrics.endpoint_label("e0") == "e0"


def test_an_answer_that_was_given_again_is_no_error() -> None:
    endpoint = metrics.endpoint_label("cached-once")
    record = RequestRecord("req-1", "key:a", endpoint, "completions", 200, 0.001, outcome="cached")
    metrics.count_request(record)
    assert metrics.REQUESTS.labels(endpoint, "completions", "200")._value.get() == 1
    told = [sample.labels for metric in metrics.ERRORS.collect() for sample in metric.samples]
    assert not [labels for labels in told if labels["endpoint"] == endpoint]


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "x",
        PARENT.upper(),
        f"ff{PARENT[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"{PARENT}\r\nEvil: 1",
        f"{PARENT}x",
    ],
)
def test_what_is_no_trace_context_is_not_passed_on(parent: str) -> None:
    assert trace_context({"traceparent": parent, "tracestate": "a=b"}) == {}


async def test_the_trace_context_and_the_id_of_the_key_reach_the_replica(server: Server, model: Path) -> None:
    await server.serve(model)
    key = await server.key()
    body = {"model": "tiny", "prompt": "headers"}
    headers = {"traceparent": PARENT, "tracestate": "vendor=1", "X-LLMC-Key": "forged", "X-Request-Id": "forged"}
    answer = await server.ask("POST", "llmcloud/v1/completions", body, key, headers=headers)
    seen = json.loads(answer.json()["choices"][0]["text"])
    assert seen["traceparent"].split("-")[1] == PARENT.split("-")[1]
    assert seen["tracestate"] == "vendor=1"
    assert seen["x-llmc-key"] == key.split("-")[2]
    assert re.fullmatch(r"req-[0-9a-f]{32}", seen["x-request-id"])
    assert key not in str(seen)


class TestOpenTelemetry:
    """With OpenTelemetry and its SDK."""

    @pytest.fixture
    def spans(self) -> Iterator[Any]:
        pytest.importorskip("opentelemetry.sdk")
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        exporter = InMemorySpanExporter()
        provider = trace.get_tracer_provider()
        if not isinstance(provider, TracerProvider):  # it can be set once in a process
            provider = TracerProvider()
            trace.set_tracer_provider(provider)
            tracing._keeps_spans.cache_clear()  # it would be found within a second
        processor = SimpleSpanProcessor(exporter)
        provider.add_span_processor(processor)
        yield exporter
        processor.shutdown()

    async def test_each_request_is_a_span_of_the_callers_trace_without_what_was_said(
        self, spans: Any, server: Server, model: Path
    ) -> None:
        await server.serve(model)
        key = await server.key()
        headers = {"traceparent": PARENT}
        body = {"model": "tiny", "prompt": "headers"}
        answer = await server.ask("POST", "llmcloud/v1/completions", body, key, headers=headers)
        [span] = spans.get_finished_spans()
        assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
        assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
        passed_on = json.loads(answer.json()["choices"][0]["text"])["traceparent"]
        assert passed_on.split("-")[2] == f"{span.context.span_id:016x}"
        assert span.attributes["gen_ai.request.model"] == "tiny" and span.attributes["gen_ai.usage.output_tokens"] == 5
        assert span.attributes["llmcloud.actor"] == f"key:{key.split('-')[2]}"
        assert key.split("-")[3] not in str(span.attributes) and "headers" not in str(dict(span.attributes).values())

    @pytest.mark.parametrize(
        ("route", "name", "operation"),
        [
            ("chat/completions", "POST /llmcloud/v1/chat/completions", "chat"),
            ("responses", "POST /llmcloud/v1/responses", "chat"),
            ("completions", "POST /llmcloud/v1/completions", "text_completion"),
            ("embeddings", "POST /llmcloud/v1/embeddings", "embeddings"),
            ("tokenize", "POST /llmcloud/v1/tokenize", None),
            ("v2/infer", "POST /llmcloud/v2/infer", None),
        ],
    )
    def test_a_span_is_named_after_what_was_asked(
        self, spans: Any, route: str, name: str, operation: str | None
    ) -> None:
        """Vectors and classes were text completions, and v2 was said to lie below v1."""
        RequestTrace({}, route, "tiny", "req-1").end(RequestRecord("req-1", "me", "tiny", route, 200, 0.1))
        [span] = spans.get_finished_spans()
        assert (span.name, span.attributes.get("gen_ai.operation.name")) == (name, operation)

    async def test_an_answer_that_is_given_again_is_a_span_too(
        self, spans: Any, server: Server, model: Path, jp_serverapp: Any
    ) -> None:
        """It was begun, and never ended."""
        await server.serve(model)
        key = await server.key()

        class Cache:
            is_on = True

            async def get(self, _: str) -> CachedAnswer:
                return CachedAnswer("application/json", b"{}")

        jp_serverapp.web_app.settings[CACHE] = Cache()
        try:
            body = {"model": "tiny", "prompt": "a", "temperature": 0}
            assert (await server.ask("POST", "llmcloud/v1/completions", body, key)).content == b"{}"
        finally:
            del jp_serverapp.web_app.settings[CACHE]
        [span] = spans.get_finished_spans()
        assert span.attributes["llmcloud.outcome"] == "cached"
