"""Clusters: workers with their devices, and what is asked to start, scale and end them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.http.base import Body, Response

NumWorkers = Annotated[int, Meta(ge=0, le=10_000)]


class StartCluster(Body, frozen=True):
    """A cluster to start, by its kind; or one that runs elsewhere, by its address."""

    kind: Annotated[
        str, Meta(description="local, cuda, ssh, slurm, ...; or module:Class of a Dask cluster.", examples=["local"])
    ] = "local"
    name: Annotated[str | None, Meta(description="By which it is spoken of; made from its kind when left out.")] = None
    workers: Annotated[int | None, Meta(description="How many to begin with; else what the kind begins with.")] = None
    options: Annotated[dict[str, Any], Meta(description="What the class of the cluster is made with.")] = {}
    address: Annotated[
        str | None, Meta(description="Of a Dask scheduler to connect to, with no other field but name.")
    ] = None


class ScaleCluster(Body, frozen=True):
    """A number of workers; or bounds, both of them, between which the load decides."""

    workers: NumWorkers | None = None
    minimum: NumWorkers | None = None
    maximum: NumWorkers | None = None


class Device(Response, frozen=True):
    """A GPU, as its driver tells of it. What is not known is null."""

    index: Annotated[int, Meta(description="On its host.")]
    name: str = ""
    uuid: str = ""
    memory_bytes: Annotated[int | None, Meta(description="In use, by anybody.")] = None
    total_memory_bytes: int | None = None
    utilization: Annotated[float | None, Meta(description="From 0 to 1, over the last moments.")] = None


class Process(Response, frozen=True):
    """A process of ours on a worker's host, and what it does there."""

    pid: int
    kind: Annotated[
        str, Meta(description="rank, replica, agent, or zygote, from which ranks are forked.", examples=["rank"])
    ]
    text: Annotated[str, Meta(description="What it does, in words: rank 3 of run long-1, replica of endpoint poet.")]
    device: Annotated[int | None, Meta(description="Index of the GPU that it uses.")] = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    cpu: Annotated[float | None, Meta(description="Cores that it keeps busy: 1.5 is one and a half.")] = None
    world_id: str = ""
    run_id: str = ""
    rank: int | None = None
    endpoint: str = ""
    holder: Annotated[str, Meta(description="Who has it: the end of a notebook's path, a process; of ranks.")] = ""


class Worker(Response, frozen=True):
    """A Dask worker with the node agent beside it. What is not known is null."""

    name: Annotated[str, Meta(description="Of its node agent.")]
    address: Annotated[str, Meta(description="Of the Dask worker.")] = ""
    host: str = ""
    state: Annotated[str, Meta(description="running, starting or silent.")] = "running"
    warning: Annotated[str, Meta(description="What is wrong with it, in one sentence; empty when nothing is.")] = ""
    num_slots: Annotated[int, Meta(description="Ranks that it can hold.")] = 0
    free_slots: int = 0
    num_cores: int | None = None
    cpu: Annotated[float | None, Meta(description="Share of the host's cores that are busy, from 0 to 1.")] = None
    memory_bytes: Annotated[int | None, Meta(description="In use on its host.")] = None
    total_memory_bytes: int | None = None
    devices: list[Device] = []
    processes: list[Process] = []
    last_seen: Annotated[float | None, Meta(description="Seconds since the epoch.")] = None


class Cluster(Response, frozen=True):
    """A cluster. Times are seconds since the epoch."""

    name: str
    kind: Annotated[str, Meta(description="As it was started; connected, when it was started elsewhere.")]
    address: Annotated[str, Meta(description="Of its Dask scheduler.")] = ""
    dashboard: Annotated[str, Meta(description="URL of Dask's dashboard, as seen from the server's host.")] = ""
    num_workers: int = 0
    num_slots: Annotated[int, Meta(description="Ranks that its workers can hold together.")] = 0
    state: Annotated[str, Meta(description="starting, running, stopping or failed.")] = "starting"
    reason: Annotated[str, Meta(description="Why it is in that state, where there is more to say.")] = ""
    created: float = 0.0
    pid: Annotated[
        int, Meta(description="Of its host process on the server's host; 0 when it was started elsewhere.")
    ] = 0
    workers: Annotated[list[Worker] | None, Meta(description="Its workers; null where they were not looked at.")] = None


class Clusters(Response, frozen=True):
    """All clusters of this server."""

    clusters: list[Cluster]


class ClusterStopped(Response, frozen=True):
    """The cluster has ended, with everything that ran on it."""

    name: str
    state: Literal["stopped"] = "stopped"


class ClusterOption(Response, frozen=True):
    """An option of a kind of cluster, as a form asks for it."""

    name: str
    type: Annotated[str, Meta(description="integer, number, boolean, choice or text.", examples=["integer"])]
    default: Annotated[str | int | float | bool | None, Meta(description="Null: what the cluster's class takes.")] = (
        None
    )
    help: Annotated[str, Meta(description="What it means, in one sentence; may be empty.")] = ""
    choices: Annotated[list[str | int | float | bool], Meta(description="Of a choice.")] = []


class ClusterKind(Response, frozen=True):
    """A kind of cluster that can be asked for."""

    kind: Annotated[str, Meta(description="As it is started by.", examples=["local"])]
    title: Annotated[str, Meta(description="As it is shown.")]
    help: Annotated[str, Meta(description="What it is, in one sentence; may be empty.")] = ""
    problem: Annotated[str, Meta(description="Why it cannot be started here, such as a package that is missing.")] = ""
    options: list[ClusterOption] = []


class ClusterKinds(Response, frozen=True):
    """Every kind of cluster with its options, and how pages reach Dask's dashboards."""

    kinds: list[ClusterKind]
    has_dashboard_proxy: Annotated[
        bool, Meta(description="Whether jupyter-server-proxy is enabled: BASE_URL/proxy/PORT leads to a dashboard.")
    ] = False


class ClusterLog(Response, frozen=True):
    """The end of what the host process of a cluster has printed."""

    name: str
    state: Annotated[str, Meta(description="Of the cluster: starting, running, stopping or failed.")]
    text: str
