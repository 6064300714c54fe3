"""Every route below `/llmcloud`."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.server.api.clusters import ClusterHandler, ClusterScaleHandler, ClustersHandler, PlacementHandler
from jupyter_llmcloud.server.api.endpoints import EndpointHandler, EndpointLogsHandler, EndpointsHandler
from jupyter_llmcloud.server.api.keys import KeyHandler, KeysHandler
from jupyter_llmcloud.server.api.runs import RunHandler, RunLogHandler, RunRecordsHandler, RunsHandler, RunStopHandler
from jupyter_llmcloud.server.api.status import LivezHandler, ReadyzHandler, StatusHandler
from jupyter_llmcloud.server.gateway.handlers import InferenceHandler, ModelHandler, ModelsHandler, UnknownPathHandler
from jupyter_llmcloud.server.gateway.open_requests import ROUTES

NAME = r"([A-Za-z0-9][A-Za-z0-9_.-]{0,127})"

HANDLERS: list[tuple[Any, ...]] = [
    (r"/llmcloud/livez", LivezHandler),
    (r"/llmcloud/readyz", ReadyzHandler),
    (r"/llmcloud/api/status", StatusHandler),
    (r"/llmcloud/api/clusters", ClustersHandler),
    (rf"/llmcloud/api/clusters/{NAME}", ClusterHandler),
    (rf"/llmcloud/api/clusters/{NAME}/scale", ClusterScaleHandler),
    (r"/llmcloud/api/placement", PlacementHandler),
    (r"/llmcloud/api/runs", RunsHandler),
    (rf"/llmcloud/api/runs/{NAME}", RunHandler),
    (rf"/llmcloud/api/runs/{NAME}/(logs|metrics)", RunRecordsHandler),
    (rf"/llmcloud/api/runs/{NAME}/log", RunLogHandler),
    (rf"/llmcloud/api/runs/{NAME}/stop", RunStopHandler),
    (r"/llmcloud/api/endpoints", EndpointsHandler),
    (rf"/llmcloud/api/endpoints/{NAME}", EndpointHandler),
    (rf"/llmcloud/api/endpoints/{NAME}/logs", EndpointLogsHandler),
    (r"/llmcloud/api/keys", KeysHandler),
    (rf"/llmcloud/api/keys/{NAME}", KeyHandler),
    (r"/llmcloud/v1/models", ModelsHandler),
    (rf"/llmcloud/v1/models/{NAME}", ModelHandler),
    *((rf"/llmcloud/v1/{route}", InferenceHandler, {"route": route}) for route in ROUTES),
    (r"/llmcloud/v1(?:/.*)?", UnknownPathHandler),
]
