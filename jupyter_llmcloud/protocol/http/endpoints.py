"""Endpoints: what is served, its replicas and their rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import UNSET, Meta, UnsetType

from jupyter_llmcloud.core.spec import EndpointSpec
from jupyter_llmcloud.protocol.http.base import Body, Query, Response
from jupyter_llmcloud.protocol.http.options import Options, options_body


class ServedSource(Body, frozen=True):
    """A cell that defines load() and predict(inputs), or an object that the kernel has kept on the server's host."""

    text: Annotated[str, Meta(description="The cell, without the line of its magic.")] = ""
    name: Annotated[str, Meta(description="As the notebook calls it: Cell In[4].")] = "the cell"
    first_line: Annotated[int, Meta(ge=1, description="Of the text, counted in the cell.")] = 1
    folder: Annotated[str, Meta(description="Where its relative paths and modules are looked for.")] = ""
    object: Annotated[str, Meta(description="The digest of a kept object, in place of a text.")] = ""


if TYPE_CHECKING:

    class StartEndpoint(Options, frozen=True):
        """A run's model or a folder to serve, with the options of an EndpointSpec."""

        target: str
        source: ServedSource | None = None
        reuse: bool = False

else:
    _SOURCE = Annotated[
        ServedSource | None, Meta(description="Code of the user's own, in place of a model: what %%serve sends.")
    ]
    _TARGET = Annotated[str, Meta(description="A run by its id or name, or a folder in the Hugging Face layout.")]
    _REUSE = Annotated[bool | UnsetType, Meta(description="Answer with one of that name that serves the same.")]
    StartEndpoint = options_body(
        "StartEndpoint",
        "A run's model or a folder to serve, and how.",
        EndpointSpec,
        [("target", _TARGET), ("source", _SOURCE, None), ("reuse", _REUSE, UNSET)],
    )


class ScaleEndpoint(Body, frozen=True):
    """How many replicas."""

    replicas: Annotated[
        int | str, Meta(description="A number, or bounds such as 1:4 between which it follows the load.")
    ]


class UpdateEndpoint(Body, frozen=True):
    """Another model for an endpoint."""

    target: Annotated[str, Meta(description="A run by its id or name, or a folder in the Hugging Face layout.")]
    canary: Annotated[
        Annotated[int, Meta(ge=1, le=99)] | None,
        Meta(description="Percent of the requests that it gets, beside what is served now."),
    ] = None


class SplitEndpoint(Body, frozen=True):
    """How requests are shared out."""

    shares: Annotated[
        dict[str, int],
        Meta(description="Percent by revision (stable, canary or a number): 100 together.", examples=[{"stable": 95}]),
    ]


class ShadowEndpoint(Body, frozen=True):
    """Who gets copies of the requests."""

    revision: Annotated[
        str | None, Meta(description="The number of a revision, or a run or folder to serve for that; null: nobody.")
    ] = None


class AddAdapter(Body, frozen=True):
    """An adapter for the model that is served."""

    target: Annotated[str, Meta(description="A folder that PEFT's save_pretrained wrote, or a run that saved one.")]
    name: Annotated[str | None, Meta(description="How it is asked for (default: the folder's or the run's name).")] = (
        None
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
    prefix_bytes: Annotated[
        int | None, Meta(description="Of the keys and values, those kept for prompts that begin alike.")
    ] = None


class Replica(Response, frozen=True, omit_defaults=True):
    """A process that serves an endpoint. What a replica has not said yet is left out."""

    id: str
    pid: int
    state: str
    in_flight: Annotated[int, Meta(description="Requests that it answers now.")]
    revision: Annotated[int, Meta(description="The number of the revision whose weights it has.")] = 0
    engine: Annotated[str | None, Meta(description="How it generates.")] = None
    num_parallel: Annotated[int | None, Meta(description="Sequences that it generates at once.")] = None
    num_threads: int | None = None
    context_length: Annotated[int | None, Meta(description="Tokens of prompt and answer together, at most.")] = None
    memory: ReplicaMemory | None = None
    host: str | None = None
    device: str | None = None
    cluster: Annotated[str, Meta(description="On which it was placed.")] = ""
    last_seen: Annotated[float | None, Meta(description="Seconds since the epoch.")] = None


class ShadowComparison(Response, frozen=True):
    """A shadow beside the revision that answers the same requests. Null: nothing is known of it yet."""

    num_compared: Annotated[int, Meta(description="Requests that both have answered.")]
    num_comparable: Annotated[
        int, Meta(description="Answers of both to greedy requests, or to such of a model that generates no text.")
    ] = 0
    equal_share: Annotated[float | None, Meta(description="Of those, how many were equal: 0 to 1.")] = None
    latency_ratio: Annotated[float | None, Meta(description="Its seconds for an answer, by the other one's.")] = None
    error_share: Annotated[float | None, Meta(description="Of the requests, those that it failed: 0 to 1.")] = None
    stable_error_share: Annotated[float | None, Meta(description="Those that the other one failed.")] = None
    num_dropped: Annotated[int, Meta(description="Requests that it did not get: it was not ready, or had no room.")] = 0


class ServedRevision(Response, frozen=True):
    """A version of the model behind an endpoint."""

    number: Annotated[int, Meta(description="As in the header x-llmcloud-revision of an answer.")]
    role: Annotated[str, Meta(description="stable, canary, shadow, previous or retired.")]
    weight: Annotated[int, Meta(description="Percent of the requests.")]
    target: str
    fingerprint: str
    num_replicas: int
    step: Annotated[int | None, Meta(description="Of a training run that is followed.")] = None
    note: Annotated[str, Meta(description="Why it was withdrawn.")] = ""
    was_stable: Annotated[
        bool | None, Meta(description="Whether it was the stable one ever: no rollback goes to another. Null: unknown.")
    ] = None
    num_requests: Annotated[int, Meta(description="Since this server serves it; of a shadow, copies.")] = 0
    num_errors: Annotated[int, Meta(description="Of them, those that failed by its fault.")] = 0
    comparison: Annotated[ShadowComparison | None, Meta(description="Of a shadow.")] = None


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
    kind: Annotated[
        str,
        Meta(
            description="What the model is for: generator (asked by /llmcloud/v1), embedder, classifier, regressor,"
            " token-classifier, image-classifier, module or python (asked by /llmcloud/v2)."
        ),
    ]
    dtype: str
    engine: Annotated[str, Meta(description="As asked for; each replica tells which one it has.")]
    num_replicas: Annotated[int, Meta(description="As asked for.")]
    base_model: str | None
    max_model_len: int | None
    max_concurrent: int | None
    threads: int | None
    keep_requests: Annotated[bool, Meta(description="Whether what is asked and answered is kept, for feedback.")]
    revision: Annotated[str, Meta(description="A fingerprint of what is served; another one for other weights.")]
    replicas: list[Replica]
    cores: Annotated[int | None, Meta(description="That a replica has; null: it shares them.")] = None
    memory_bytes: Annotated[int | None, Meta(description="That a replica may take; null: not stated.")] = None
    cache_bytes: Annotated[int | None, Meta(description="For keys and values of a replica; null: as is free.")] = None
    devices: Annotated[int | None, Meta(description="GPUs of a replica; null: one where there is one.")] = None
    keep_previous: Annotated[
        float | None, Meta(description="Seconds that replicas are kept after an update, for a rollback.")
    ] = None
    priority: Annotated[int, Meta(description="Against runs and endpoints that want the same slots.")] = 0
    min_replicas: Annotated[int | None, Meta(description="Bounds of autoscaling; null: the number is fixed.")] = None
    max_replicas: int | None = None
    step: Annotated[int | None, Meta(description="The step of the run that is served, where it is followed.")] = None
    revisions: Annotated[list[ServedRevision], Meta(description="The newest last.")] = []
    adapters: Annotated[list[str], Meta(description="Asked for as the model NAME:ADAPTER.")] = []
    follows: Annotated[str | None, Meta(description="The run whose newest weights are served.")] = None
    url: Annotated[str, Meta(description="The base URL for OpenAI clients, as this client reached the server.")] = ""
    inputs: Annotated[
        str, Meta(description="JSON of inputs to ask a torch.nn.Module with, or a word for them; empty for others.")
    ] = ""
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
