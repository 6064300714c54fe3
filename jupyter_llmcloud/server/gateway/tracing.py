"""Traces of requests: a span for each where OpenTelemetry is installed (`pip install jupyter-llmcloud[otel]`), and the
trace context of W3C passed on to the replica in any case.

Which spans are kept, and where they go, is OpenTelemetry's own configuration: `opentelemetry-instrument jupyter lab`,
or a tracer provider that the server's configuration sets. A span never holds a prompt, an answer or a key's secret.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jupyter_llmcloud.storage.server_state import RequestRecord

_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?", re.ASCII
)
MAX_TRACESTATE = 512
# What OpenTelemetry's conventions call it; of other routes there is no word.
_OPERATIONS = {
    "chat/completions": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}


@cache
def _tracing() -> Any:
    """OpenTelemetry's modules, where they are installed."""
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        return None
    return trace, propagate


@lru_cache(maxsize=1)
def _keeps_spans(second: int) -> bool:
    """Whether somebody has set a provider by this second: without one, spans are made for nobody."""
    if (found := _tracing()) is None:
        return False
    trace, _ = found
    return not isinstance(trace.get_tracer_provider(), (trace.ProxyTracerProvider, trace.NoOpTracerProvider))


def trace_context(headers: Mapping[str, str]) -> dict[str, str]:
    """`traceparent` and `tracestate` of a request, as far as they have the form of W3C's Trace Context."""
    if (parent := headers.get("traceparent", "").strip()) == "":
        return {}
    if not _TRACEPARENT.fullmatch(parent):
        return {}
    state = headers.get("tracestate", "").strip()
    return {"traceparent": parent, **({"tracestate": state} if 0 < len(state) <= MAX_TRACESTATE else {})}


class RequestTrace:
    """The span of one request, or nothing of the kind.

    Args:
        context: as `trace_context` tells it.

    Attributes:
        headers: that tell the replica which trace it is part of.
    """

    def __init__(self, context: Mapping[str, str], route: str, endpoint: str, request_id: str) -> None:
        self.headers = dict(context)
        self._span: Any = None
        if _keeps_spans(int(time.monotonic())):
            trace, propagate = _tracing()
            operation = {"gen_ai.operation.name": _OPERATIONS[route]} if route in _OPERATIONS else {}
            self._span = trace.get_tracer("jupyter_llmcloud").start_span(
                f"POST /llmcloud/{route if route.startswith('v2/') else f'v1/{route}'}",
                context=propagate.extract(self.headers),
                kind=trace.SpanKind.SERVER,
                attributes={
                    **operation,
                    "gen_ai.request.model": endpoint,
                    "http.request.method": "POST",
                    "llmcloud.request_id": request_id,
                },
            )
            if self._span.get_span_context().is_valid:
                propagate.inject(self.headers, trace.set_span_in_context(self._span))

    def end(self, record: RequestRecord) -> None:
        """The request is over."""
        if self._span is None:
            return
        trace, _ = _tracing()
        told = {
            "http.response.status_code": record.status,
            "llmcloud.actor": record.actor,
            "llmcloud.replica": record.replica,
            "llmcloud.outcome": record.outcome,
            "llmcloud.first_byte_s": record.first_byte_s,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
        }
        self._span.set_attributes({name: value for name, value in told.items() if value is not None})
        if record.status >= 500:
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, record.outcome))
        self._span.end()
