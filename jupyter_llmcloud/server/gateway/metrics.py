"""What Jupyter's `/metrics` tells of endpoints. Labels are bounded: names of endpoints, routes, classes of errors."""

from __future__ import annotations

import functools
import time
import weakref
from collections import Counter as Tally
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from jupyter_llmcloud.core.serving.openai_errors import error_type

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from jupyter_llmcloud.server.endpoints.registry import EndpointRegistry
    from jupyter_llmcloud.storage.server_state import RequestRecord

MAX_ENDPOINTS = 200  # of which each has its own label; further ones share another
OTHER = "other"
_STATUSES = (200, 400, 401, 403, 404, 413, 429, 499, 500, 503)
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

IN_FLIGHT = Gauge("llmcloud_requests_in_flight", "Requests to endpoints that are being answered")
REQUESTS = Counter("llmcloud_requests_total", "Requests to endpoints", ["endpoint", "route", "status"])
ERRORS = Counter(
    "llmcloud_errors_total", "Requests that were not answered, by the class of the error", ["endpoint", "error"]
)
TOKENS = Counter("llmcloud_tokens_total", "Tokens of prompts and of answers", ["endpoint", "kind"])
FIRST_BYTE = Histogram(
    "llmcloud_first_byte_seconds",
    "From a request to the first byte of its answer",
    ["endpoint", "route"],
    buckets=_FINE,
)
FIRST_TOKEN = Histogram(
    "llmcloud_time_to_first_token_seconds",
    "From a request to the first event of its stream",
    ["endpoint"],
    buckets=_FINE,
)
INTER_TOKEN = Histogram(
    "llmcloud_inter_token_seconds", "Between two pieces of a stream, at the gateway", ["endpoint"], buckets=_FINE
)
QUEUE_WAIT = Histogram(
    "llmcloud_queue_wait_seconds", "Until a request has a place at a replica", ["endpoint"], buckets=_FINE
)

_known: set[str] = set()


def endpoint_label(name: str) -> str:
    """The label of an endpoint that exists."""
    if name not in _known:
        if len(_known) >= MAX_ENDPOINTS:
            return OTHER
        _known.add(name)
    return name


def count_request(record: RequestRecord) -> None:
    """A request to an endpoint is over."""
    endpoint = endpoint_label(record.endpoint)
    status = record.status if record.status in _STATUSES else record.status // 100 * 100
    REQUESTS.labels(endpoint, record.route, str(status)).inc()
    if record.first_byte_s is not None:
        FIRST_BYTE.labels(endpoint, record.route).observe(record.first_byte_s)
    if record.status >= 400 or record.outcome not in ("done", "cached"):
        error = record.outcome if record.outcome != "done" else error_type(record.status)
        ERRORS.labels(endpoint, error).inc()


def count_tokens(record: RequestRecord) -> None:
    """What a request has cost is known."""
    endpoint = endpoint_label(record.endpoint)
    TOKENS.labels(endpoint, "prompt").inc(record.prompt_tokens or 0)
    TOKENS.labels(endpoint, "generated").inc(record.completion_tokens or 0)


@functools.lru_cache(maxsize=MAX_ENDPOINTS + 1)
def _of_stream(endpoint: str) -> tuple[Histogram, Histogram]:
    """Of an endpoint, by its label: the time to the first piece, and between two."""
    return FIRST_TOKEN.labels(endpoint), INTER_TOKEN.labels(endpoint)


@functools.lru_cache(maxsize=MAX_ENDPOINTS + 1)
def queue_wait_of(endpoint: str) -> Histogram:
    """Of an endpoint, by its name."""
    return QUEUE_WAIT.labels(endpoint_label(endpoint))


def note_answer(handler: type, method: str, seconds: float, status: int, settings: dict[str, Any]) -> None:
    """An answer to a question, in Jupyter's own metric of all requests, where the server has that on."""
    from jupyter_server.prometheus.metrics import HTTP_REQUEST_DURATION_SECONDS

    if getattr(settings.get("serverapp"), "record_http_request_metrics", True):
        name = f"{handler.__module__}.{handler.__name__}"
        noted = HTTP_REQUEST_DURATION_SECONDS.labels(method=method, handler=name, status_code=status)
        noted.observe(seconds)


class StreamTimes:
    """When the pieces of one stream came."""

    def __init__(self, endpoint: str, began: float) -> None:
        """`began`: when the request came, on the clock of `time.perf_counter`."""
        self._first, self._gaps = _of_stream(endpoint_label(endpoint))
        self._last = began
        self._has_begun = False

    def piece(self) -> None:
        """A piece is passed on."""
        now = time.perf_counter()
        if self._has_begun:
            self._gaps.observe(now - self._last)
        else:
            self._has_begun = True
            self._first.observe(now - self._last)
        self._last = now


class EndpointCollector(Collector):
    """What can be read of the endpoints of the servers in this process whenever somebody asks for the metrics."""

    def __init__(self) -> None:
        self._registries: weakref.WeakSet[EndpointRegistry] = weakref.WeakSet()

    def add(self, endpoints: EndpointRegistry) -> None:
        """Tell of these too."""
        self._registries.add(endpoints)

    def discard(self, endpoints: EndpointRegistry) -> None:
        """Tell of these no longer."""
        self._registries.discard(endpoints)

    def collect(self) -> Iterator[Metric]:
        """Replicas by state, requests at them and waiting for them, memory of their caches."""
        replicas = GaugeMetricFamily("llmcloud_replicas", "Replicas by their state", labels=["endpoint", "state"])
        cache = GaugeMetricFamily(
            "llmcloud_kv_cache_bytes", "Keys and values that replicas hold, and may hold", labels=["endpoint", "kind"]
        )
        waiting = GaugeMetricFamily(
            "llmcloud_requests_waiting", "Requests that wait for a replica", labels=["endpoint"]
        )
        active = [endpoint for registry in self._registries for endpoint in registry.list() if endpoint.is_active]
        for endpoint in active[:MAX_ENDPOINTS]:
            rows = endpoint.describe()["replicas"]
            for state, number in Tally(row["state"] for row in rows).items():
                replicas.add_metric([endpoint.name, state], number)
            memory = [row["memory"] for row in rows if row.get("memory")]
            for kind, field in (("used", "cache_bytes"), ("max", "max_cache_bytes")):
                if known := [row[field] for row in memory if row.get(field) is not None]:
                    cache.add_metric([endpoint.name, kind], sum(known))
            waiting.add_metric([endpoint.name], endpoint.admission.num_waiting)
        yield from (replicas, cache, waiting)

    def describe(self) -> Iterator[Metric]:
        """Nothing is read when it is registered."""
        return iter(())


ENDPOINTS = EndpointCollector()
REGISTRY.register(ENDPOINTS)
