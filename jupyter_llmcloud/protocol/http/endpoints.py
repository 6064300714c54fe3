"""Endpoints: what is served, its replicas and their rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from jupyter_llmcloud.core.spec import EndpointSpec
from jupyter_llmcloud.protocol.http.base import Query, Response
from jupyter_llmcloud.protocol.http.options import Options, options_body

if TYPE_CHECKING:

    class StartEndpoint(Options, frozen=True):
        """A run's model or a folder to serve, with the options of an EndpointSpec."""

        target: str

else:
    _TARGET = Annotated[str, Meta(description="A run by its id or name, or a folder in the Hugging Face layout.")]
    StartEndpoint = options_body(
        "StartEndpoint", "A run's model or a folder to serve, and how.", EndpointSpec, [("target", _TARGET)]
    )


class EndpointQuery(Query, frozen=True):
    """Whether to wait."""

    wait_s: Annotated[
        int, Meta(ge=0, le=60, description="Answer when it is not starting any more, or after so many seconds.")
    ] = 0


class EndpointLogsQuery(Query, frozen=True):
    """How much."""

    limit: Annotated[int, Meta(ge=0, le=10_000, description="Lines of each replica, the newest.")] = 200


class ReplicaMemory(Response, frozen=True, omit_defaults=True):
    """What a replica takes, in bytes."""

    process_bytes: Annotated[int, Meta(description="Of its process and those that it has started, on the host.")]
    cache_bytes: Annotated[int | None, Meta(description="Keys and values of the sequences it holds now.")] = None
    max_cache_bytes: int | None = None


class Replica(Response, frozen=True, omit_defaults=True):
    """A process that serves an endpoint. What a replica has not said yet is left out."""

    id: str
    pid: int
    state: str
    in_flight: Annotated[int, Meta(description="Requests that it answers now.")]
    engine: Annotated[str | None, Meta(description="How it generates.")] = None
    num_parallel: Annotated[int | None, Meta(description="Sequences that it generates at once.")] = None
    num_threads: int | None = None
    context_length: Annotated[int | None, Meta(description="Tokens of prompt and answer together, at most.")] = None
    memory: ReplicaMemory | None = None
    host: str | None = None
    device: str | None = None
    last_seen: Annotated[float | None, Meta(description="Seconds since the epoch.")] = None


class EndpointRates(Response, frozen=True):
    """What went through an endpoint in the last `window_s` seconds."""

    window_s: float
    requests_per_s: float = 0.0
    tokens_per_s: Annotated[float, Meta(description="Generated, over all requests.")] = 0.0
    errors_per_s: Annotated[float, Meta(description="Requests that ended with an error.")] = 0.0
    first_token_s: Annotated[
        float | None, Meta(description="Median seconds until the first token; null when nobody asked.")
    ] = None
    num_queued: Annotated[int, Meta(description="Requests that wait for a replica now.")] = 0
    num_in_flight: Annotated[int, Meta(description="Requests that are answered now.")] = 0


class Endpoint(Response, frozen=True):
    """An endpoint. Times are seconds since the epoch."""

    name: Annotated[str, Meta(description="Also the name of the model that OpenAI clients ask for.")]
    state: Annotated[str, Meta(description="starting, ready, failed or stopped.")]
    created: float
    reason: Annotated[str, Meta(description="Why it is in that state, where there is more to say.")]
    cluster: Annotated[str | None, Meta(description="As asked for; null for the newest.")]
    model: Annotated[str, Meta(description="The folder that is served.")]
    target: Annotated[str, Meta(description="As asked for: a run or a folder.")]
    dtype: str
    engine: Annotated[str, Meta(description="As asked for; each replica tells which one it has.")]
    num_replicas: Annotated[int, Meta(description="As asked for.")]
    base_model: str | None
    max_model_len: int | None
    max_concurrent: int | None
    threads: int | None
    revision: Annotated[str, Meta(description="A fingerprint of what is served; another one for other weights.")]
    replicas: list[Replica]
    url: Annotated[str, Meta(description="The base URL for OpenAI clients, as this client reached the server.")] = ""
    rates: Annotated[EndpointRates | None, Meta(description="Null where nothing counts them.")] = None


class Endpoints(Response, frozen=True):
    """Endpoints, the newest first."""

    endpoints: list[Endpoint]


class ReplicaLog(Response, frozen=True):
    """The end of what a replica printed."""

    path: str
    text: str


class EndpointLogs(Response, frozen=True):
    """Of each replica, the newest last."""

    logs: list[ReplicaLog]
