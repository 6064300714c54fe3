"""Every route below `/llmcloud`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.server.answers.feedback import (
    DriftHandler,
    FeedbackDatasetHandler,
    FeedbackHandler,
    GiveFeedbackHandler,
)
from jupyter_llmcloud.server.api.cluster_kinds import ClusterKindsHandler, ClusterLogHandler
from jupyter_llmcloud.server.api.clusters import (
    ClusterHandler,
    ClusterScaleHandler,
    ClustersHandler,
    PlacementHandler,
)
from jupyter_llmcloud.server.api.endpoints import (
    EndpointAdapterHandler,
    EndpointAdaptersHandler,
    EndpointHandler,
    EndpointLogsHandler,
    EndpointRollbackHandler,
    EndpointScaleHandler,
    EndpointShadowHandler,
    EndpointsHandler,
    EndpointSplitHandler,
    EndpointUpdateHandler,
)
from jupyter_llmcloud.server.api.keys import (
    KeyAlertsHandler,
    KeyHandler,
    KeyRotationHandler,
    KeysHandler,
    KeyUsageHandler,
)
from jupyter_llmcloud.server.api.runs import (
    RunCheckpointHandler,
    RunHandler,
    RunLogHandler,
    RunLogsHandler,
    RunMetricsHandler,
    RunSeriesHandler,
    RunsHandler,
    RunStopHandler,
    RunViewHandler,
)
from jupyter_llmcloud.server.api.status import LivezHandler, ReadyzHandler, StatusHandler
from jupyter_llmcloud.server.api.worlds import (
    WorldHandler,
    WorldsHandler,
    WorldStacksHandler,
    WorldVariablesHandler,
)
from jupyter_llmcloud.server.batches.handlers import (
    BatchCancelHandler,
    BatchesHandler,
    BatchHandler,
    FileContentHandler,
    FileHandler,
    FilesHandler,
)
from jupyter_llmcloud.server.datasets.handlers import PreparationHandler, PreparationsHandler, PreparationStopHandler
from jupyter_llmcloud.server.events.handler import EventsHandler
from jupyter_llmcloud.server.events.poll_handler import PollHandler
from jupyter_llmcloud.server.gateway.handlers import (
    DeploymentHandler,
    InferenceHandler,
    InputItemsHandler,
    ModelHandler,
    ModelsHandler,
    StoredResponseHandler,
    UnknownPathHandler,
)
from jupyter_llmcloud.server.gateway.keyed.exchange import Services
from jupyter_llmcloud.server.gateway.keyed.router import KeyedRouter
from jupyter_llmcloud.server.gateway.open_inference import (
    INFER_ROUTES,
    ModelConfigHandler,
    ModelMetadataHandler,
    ModelReadyHandler,
    ModelVersionConfigHandler,
    ModelVersionHandler,
    ModelVersionReadyHandler,
    OpenInferenceHandler,
    OpenInferenceVersionHandler,
    RepositoryIndexHandler,
    ServerLiveHandler,
    ServerMetadataHandler,
    ServerReadyHandler,
    UnknownOpenInferencePathHandler,
)
from jupyter_llmcloud.server.gateway.open_requests import INFERENCE_ROUTES
from jupyter_llmcloud.server.openapi.handler import OpenApiHandler
from jupyter_llmcloud.server.openapi.openai_surface import OpenAIDocumentHandler
from jupyter_llmcloud.server.recorded.handlers import RunComparisonHandler, RunExportHandler
from jupyter_llmcloud.server.sweeps.handlers import SweepHandler, SweepsHandler, SweepStopHandler

if TYPE_CHECKING:
    from tornado.web import Application

    from jupyter_llmcloud.server.context import ServerContext

SETTING = "jupyter_llmcloud_context"
NAME = r"([A-Za-z0-9][A-Za-z0-9_.-]{0,127})"
VERSION = r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})"

_JSON = ("audit", "started")
_RUNS = (*_JSON, "runs", "run_states")
_GATEWAY = ("state", "endpoints", "alerts", "started")
_FEEDBACK = (*_JSON, "endpoints", "keeper", "state")
_BATCHES = (*_GATEWAY, "batches")
_INFERENCE = (*_GATEWAY, "requests", "quotas", "keeper")

_OF_CLIENTS = ("/llmcloud/v1", "/llmcloud/v2")

# Where a route is, what answers there, and which services of the server it takes.
ROUTES: list[tuple[str, type[Any], tuple[str, ...]]] = [
    (r"/llmcloud/livez", LivezHandler, _JSON),
    (r"/llmcloud/readyz", ReadyzHandler, _JSON),
    (r"/llmcloud/health", ReadyzHandler, _JSON),  # where load generators look
    (r"/llmcloud/openapi\.json", OpenApiHandler, (*_JSON, "routes")),
    (r"/llmcloud/api/events", EventsHandler, ("events", "started")),
    (r"/llmcloud/api/events/poll", PollHandler, (*_JSON, "polls")),
    (r"/llmcloud/api/status", StatusHandler, (*_JSON, "identity")),
    (r"/llmcloud/api/clusters", ClustersHandler, (*_JSON, "clusters")),
    (rf"/llmcloud/api/clusters/{NAME}", ClusterHandler, (*_JSON, "clusters")),
    (rf"/llmcloud/api/clusters/{NAME}/scale", ClusterScaleHandler, (*_JSON, "clusters")),
    (rf"/llmcloud/api/clusters/{NAME}/log", ClusterLogHandler, (*_JSON, "clusters")),
    (r"/llmcloud/api/cluster-kinds", ClusterKindsHandler, _JSON),
    (r"/llmcloud/api/placement", PlacementHandler, (*_JSON, "clusters")),
    (r"/llmcloud/api/worlds", WorldsHandler, (*_JSON, "clusters")),
    (r"/llmcloud/api/worlds/(.+)/stacks", WorldStacksHandler, (*_JSON, "clusters")),
    (r"/llmcloud/api/worlds/(.+)/variables", WorldVariablesHandler, (*_JSON, "clusters")),
    (r"/llmcloud/api/worlds/(.+)", WorldHandler, (*_JSON, "clusters")),
    (r"/llmcloud/api/runs", RunsHandler, (*_RUNS, "starts")),
    (rf"/llmcloud/api/runs/{NAME}", RunHandler, _RUNS),
    (rf"/llmcloud/api/runs/{NAME}/logs", RunLogsHandler, _RUNS),
    (rf"/llmcloud/api/runs/{NAME}/metrics", RunMetricsHandler, _RUNS),
    (rf"/llmcloud/api/runs/{NAME}/log", RunLogHandler, _RUNS),
    (rf"/llmcloud/api/runs/{NAME}/series", RunSeriesHandler, (*_RUNS, "series")),
    (rf"/llmcloud/api/runs/{NAME}/checkpoint", RunCheckpointHandler, _RUNS),
    (rf"/llmcloud/api/runs/{NAME}/stop", RunStopHandler, _RUNS),
    (rf"/llmcloud/api/runs/{NAME}/view", RunViewHandler, _RUNS),
    (rf"/llmcloud/api/runs/{NAME}/export", RunExportHandler, _RUNS),
    (r"/llmcloud/api/run-comparison", RunComparisonHandler, _RUNS),
    (r"/llmcloud/api/endpoints", EndpointsHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}", EndpointHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/logs", EndpointLogsHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/feedback", FeedbackHandler, _FEEDBACK),
    (rf"/llmcloud/api/endpoints/{NAME}/feedback/dataset", FeedbackDatasetHandler, _FEEDBACK),
    (rf"/llmcloud/api/endpoints/{NAME}/drift", DriftHandler, _FEEDBACK),
    (rf"/llmcloud/api/endpoints/{NAME}/scale", EndpointScaleHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/update", EndpointUpdateHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/split", EndpointSplitHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/rollback", EndpointRollbackHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/adapters", EndpointAdaptersHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/adapters/{NAME}", EndpointAdapterHandler, (*_JSON, "endpoints")),
    (rf"/llmcloud/api/endpoints/{NAME}/shadow", EndpointShadowHandler, (*_JSON, "endpoints")),
    (r"/llmcloud/api/preparations", PreparationsHandler, (*_JSON, "preparations")),
    (rf"/llmcloud/api/preparations/{NAME}", PreparationHandler, (*_JSON, "preparations")),
    (rf"/llmcloud/api/preparations/{NAME}/stop", PreparationStopHandler, (*_JSON, "preparations")),
    (r"/llmcloud/api/sweeps", SweepsHandler, (*_JSON, "sweeps")),
    (rf"/llmcloud/api/sweeps/{NAME}", SweepHandler, (*_JSON, "sweeps")),
    (rf"/llmcloud/api/sweeps/{NAME}/stop", SweepStopHandler, (*_JSON, "sweeps")),
    (r"/llmcloud/api/keys", KeysHandler, (*_JSON, "state")),
    (r"/llmcloud/api/keys/usage", KeyUsageHandler, (*_JSON, "state", "requests")),
    (r"/llmcloud/api/keys/alerts", KeyAlertsHandler, (*_JSON, "state")),
    (rf"/llmcloud/api/keys/{NAME}/rotate", KeyRotationHandler, (*_JSON, "state")),
    (rf"/llmcloud/api/keys/{NAME}", KeyHandler, (*_JSON, "state", "requests")),
    (r"/llmcloud/v1/openapi\.json", OpenAIDocumentHandler, (*_GATEWAY, "routes")),
    (r"/llmcloud/v1/models", ModelsHandler, _GATEWAY),
    (rf"/llmcloud/v1/models/{NAME}", ModelHandler, _GATEWAY),
    (r"/llmcloud/v1/feedback", GiveFeedbackHandler, (*_GATEWAY, "requests", "keeper")),
    (r"/llmcloud/v1/files", FilesHandler, _BATCHES),
    (rf"/llmcloud/v1/files/{NAME}", FileHandler, _BATCHES),
    (rf"/llmcloud/v1/files/{NAME}/content", FileContentHandler, _BATCHES),
    (r"/llmcloud/v1/batches", BatchesHandler, _BATCHES),
    (rf"/llmcloud/v1/batches/{NAME}", BatchHandler, _BATCHES),
    (rf"/llmcloud/v1/batches/{NAME}/cancel", BatchCancelHandler, _BATCHES),
    (rf"/llmcloud/v1/responses/{NAME}", StoredResponseHandler, _GATEWAY),
    (rf"/llmcloud/v1/responses/{NAME}/input_items", InputItemsHandler, _GATEWAY),
    *(
        (rf"/llmcloud/v1{azure}/deployments/{NAME}/({route})", DeploymentHandler, _INFERENCE)
        for azure in ("", "/openai")
        for route in ("completions", "chat/completions", "embeddings")
    ),
    *((rf"/llmcloud/v1/({route})", InferenceHandler, _INFERENCE) for route in INFERENCE_ROUTES),
    (r"/llmcloud/v2", ServerMetadataHandler, _GATEWAY),
    (r"/llmcloud/v2/health/live", ServerLiveHandler, _GATEWAY),
    (r"/llmcloud/v2/health/ready", ServerReadyHandler, _GATEWAY),
    (rf"/llmcloud/v2/models/{NAME}", ModelMetadataHandler, _GATEWAY),
    (rf"/llmcloud/v2/models/{NAME}/ready", ModelReadyHandler, _GATEWAY),
    (rf"/llmcloud/v2/models/{NAME}/versions/{VERSION}", ModelVersionHandler, _GATEWAY),
    (rf"/llmcloud/v2/models/{NAME}/versions/{VERSION}/ready", ModelVersionReadyHandler, _GATEWAY),
    (rf"/llmcloud/v2/models/{NAME}/config", ModelConfigHandler, _GATEWAY),
    (rf"/llmcloud/v2/models/{NAME}/versions/{VERSION}/config", ModelVersionConfigHandler, _GATEWAY),
    (r"/llmcloud/v2/repository/index", RepositoryIndexHandler, _GATEWAY),
    *(
        route
        for verb in INFER_ROUTES
        for route in (
            (rf"/llmcloud/v2/models/{NAME}/({verb})", OpenInferenceHandler, _INFERENCE),
            (rf"/llmcloud/v2/models/{NAME}/versions/{VERSION}/({verb})", OpenInferenceVersionHandler, _INFERENCE),
        )
    ),
    (r"/llmcloud/v2(?:/.*)?", UnknownOpenInferencePathHandler, _GATEWAY),
    (r"/llmcloud/(?:chat/completions|completions|responses|embeddings|models|messages)", UnknownPathHandler, _GATEWAY),
    (r"/llmcloud/v1(?:/.*)?", UnknownPathHandler, _GATEWAY),
]


def handlers(context: ServerContext) -> list[tuple[str, type[Any], dict[str, Any]]]:
    """The routes of one server, each with the services it takes."""

    def service(name: str) -> Any:
        return ROUTES if name == "routes" else getattr(context, name)

    # They are tried one after the other; those of inference come first, which somebody waits for token by token.
    ordered = sorted(ROUTES, key=lambda route: not issubclass(route[1], InferenceHandler))
    return [
        (_as_clients_write(path), handler, {name: service(name) for name in names}) for path, handler, names in ordered
    ]


def keyed_router(context: ServerContext, application: Application) -> KeyedRouter:
    """What answers requests with a key before these routes, where that is possible without a handler."""
    services = Services(context.requests, context.quotas, context.keeper, application.settings, context.requests.log)
    of_handler = {name: getattr(context, name) for name in _INFERENCE}
    return KeyedRouter(
        application, InferenceHandler, of_handler, services, context.state, context.endpoints, context.alerts
    )


def _as_clients_write(path: str) -> str:
    """A path of the gateway also with slashes too many, which clients make of a base URL that ends in one."""
    for root in _OF_CLIENTS:
        if path.startswith(f"{root}/"):
            return f"{root}/+{path.removeprefix(f'{root}/')}/*"
    return path
