"""`/llmcloud/v2`: the Open Inference Protocol, answered by replicas; errors are `{"error": "what went wrong"}`.

https://github.com/kserve/open-inference-protocol (inference_rest.md), with the binary tensor data extension. Keys and
scopes are those of `/llmcloud/v1`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from jupyter_llmcloud.core.serving.endpoint.routing import RequestShape
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.protocol.http.gateway import (
    ConfiguredTensor,
    IndexedModel,
    ModelConfig,
    ModelReady,
    ServerHealth,
    ServerMetadata,
)
from jupyter_llmcloud.server.api.status import package_version
from jupyter_llmcloud.server.endpoints.replica_client import ReplicaLost
from jupyter_llmcloud.server.gateway.auth import GatewayHandler, gateway_access
from jupyter_llmcloud.server.gateway.handlers import InferenceHandler
from jupyter_llmcloud.server.gateway.proxy import HEADER_LENGTH

if TYPE_CHECKING:
    from jupyter_llmcloud.server.endpoints.controller import EndpointController

MAX_TENSORS = 16 << 20  # bytes of a body: a batch of images as numbers
METADATA_TIMEOUT_S = 10.0
INFER_ROUTES = ("infer", "infer_stream")
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository(index)")
# Of the types that a model's configuration names otherwise than its metadata does.
_CONFIGURED_TYPES = {"BYTES": "TYPE_STRING"}
_FROM_CLIENT = (HEADER_LENGTH, "Content-Type")  # not Content-Encoding: the body is decoded here


class OpenInferenceErrors(GatewayHandler):
    """Errors as the protocol has them."""

    def error_body(self, error: ApiError) -> Any:
        """One text."""
        return {"error": error.message}


class ServerMetadataHandler(OpenInferenceErrors):
    """The server."""

    @gateway_access("read", ServerMetadata)
    async def get(self) -> None:
        """Tell what answers here, and which extensions of the protocol it has."""
        told = ServerMetadata(name="jupyter-llmcloud", version=package_version(), extensions=list(EXTENSIONS))
        self.finish(msgspec.json.encode(told))


class ServerLiveHandler(OpenInferenceErrors):
    """Whether the server answers."""

    @gateway_access("read", ServerHealth)
    async def get(self) -> None:
        """Say that it lives."""
        self.finish(msgspec.json.encode(ServerHealth(live=True)))


class ServerReadyHandler(OpenInferenceErrors):
    """Whether the server takes requests."""

    @gateway_access("read", ServerHealth)
    async def get(self) -> None:
        """Say that it is ready: the endpoints of earlier servers are known. Each model has a readiness of its own."""
        await self.started()
        self.finish(msgspec.json.encode(ServerHealth(ready=True)))


class ModelMetadataHandler(OpenInferenceErrors):
    """A model: its inputs and outputs."""

    @gateway_access("read")
    async def get(self, name: str) -> None:
        """Tell what a model takes and gives, as one of its replicas says."""
        await self._tell(name, f"/v2/models/{name}")

    async def _tell(self, name: str, path: str) -> None:
        await self.started()
        status, body = await _asked(self.endpoint(name), path)
        self.set_status(status)
        self.finish(self._told(body) if status == 200 else body)

    def _told(self, metadata: bytes) -> bytes:
        return metadata


class ModelVersionHandler(ModelMetadataHandler):
    """A version of a model; each has one at a time."""

    @gateway_access("read")
    async def get(self, name: str, version: str) -> None:  # type: ignore[override]
        """Tell what this version of a model takes and gives."""
        await self._tell(name, f"/v2/models/{name}/versions/{version}")


class ModelConfigHandler(ModelMetadataHandler):
    """A model's configuration, as clients of Triton ask for it."""

    @gateway_access("read", ModelConfig)
    async def get(self, name: str) -> None:
        """Tell what a model takes and gives, in the words of Triton's model configuration."""
        await self._tell(name, f"/v2/models/{name}")

    def _told(self, metadata: bytes) -> bytes:
        return msgspec.json.encode(_configuration(msgspec.json.decode(metadata)))


class ModelVersionConfigHandler(ModelConfigHandler):
    """The configuration of a version of a model."""

    @gateway_access("read", ModelConfig)
    async def get(self, name: str, version: str) -> None:  # type: ignore[override]
        """Tell what this version of a model takes and gives, in the words of Triton's model configuration."""
        await self._tell(name, f"/v2/models/{name}/versions/{version}")


class RepositoryIndexHandler(OpenInferenceErrors):
    """The models, as clients of Triton ask for them."""

    @gateway_access("execute")
    async def post(self) -> None:
        """List the models that may be asked, and whether each has a replica that answers."""
        await self.started()
        models = [
            IndexedModel(name=live.name, version="1", state="READY", reason="")
            if live.ready_replicas()
            else IndexedModel(name=live.name, version="1", state="UNAVAILABLE", reason=live.reason or live.state)
            for live in self.endpoints.list()
            if live.is_active and self.may_ask(live.name)
        ]
        self.finish(msgspec.json.encode(models))


class ModelReadyHandler(OpenInferenceErrors):
    """Whether a model answers."""

    @gateway_access("read", ModelReady)
    async def get(self, name: str) -> None:
        """Say whether a model has a replica that answers: 200, or 503 while it has none."""
        await self._tell(name)

    async def _tell(self, name: str) -> None:
        await self.started()
        is_ready = bool(self.endpoint(name).ready_replicas())
        self.set_status(200 if is_ready else 503)
        self.finish(msgspec.json.encode(ModelReady(name=name, ready=is_ready)))


class ModelVersionReadyHandler(ModelReadyHandler):
    """Whether a version of a model answers."""

    @gateway_access("read", ModelReady)
    async def get(self, name: str, version: str) -> None:  # type: ignore[override]
        """Say whether this version of a model has a replica that answers."""
        if version != "1":
            raise ApiError(404, f"model {name[:128]!r} has no version {version[:40]!r}: there is 1.")
        await self._tell(name)


class OpenInferenceHandler(OpenInferenceErrors, InferenceHandler):
    """A request to a model that is no text generator."""

    max_body = MAX_TENSORS

    @gateway_access("execute")
    async def post(self, name: str, verb: str) -> None:  # type: ignore[override]
        """Ask a model with tensors, or with any JSON value as `inputs`; infer_stream answers piece by piece."""
        await self._ask_with_tensors(name, f"/v2/models/{name}/{verb}", verb)

    async def _ask_with_tensors(self, name: str, path: str, verb: str) -> None:
        body = self._whole_body()
        await self.started()
        self._asked_for = name
        endpoint = self.endpoint(name)
        self._exchange.note_activity()
        # It costs a request of the key's quota and no tokens.
        shape = RequestShape(key=self.actor)
        given = {header: self.request.headers[header] for header in _FROM_CLIENT if header in self.request.headers}
        if set(given) <= {"Content-Type"}:
            given = {}
        await self.pass_on(endpoint, f"v2/{verb}", body, shape, path, given)

    @property
    def asked_route(self) -> str:
        """As usage names it."""
        return f"v2/{self.path_args[-1]}" if self.path_args else "v2"


class OpenInferenceVersionHandler(OpenInferenceHandler):
    """A request to a version of a model."""

    @gateway_access("execute")
    async def post(self, name: str, version: str, verb: str) -> None:  # type: ignore[override]
        """Ask this version of a model."""
        await self._ask_with_tensors(name, f"/v2/models/{name}/versions/{version}/{verb}", verb)


class UnknownOpenInferencePathHandler(OpenInferenceErrors):
    """Anything else below `/llmcloud/v2`: 404, and only for who may ask."""

    async def prepare(self) -> None:  # type: ignore[override]
        """Answer."""
        await super().prepare()
        if self.request.method == "OPTIONS":
            return
        raise ApiError(404, f"{self.request.method} {self.request.path} does not exist here.", code="unknown_url")


def _configuration(told: dict[str, Any]) -> ModelConfig:
    """A model's metadata in the words of its configuration. Its shapes are whole: the batch is no axis of its own."""
    tensors = {
        kind: [
            ConfiguredTensor(
                name=one["name"],
                data_type=_CONFIGURED_TYPES.get(one["datatype"], f"TYPE_{one['datatype']}"),
                dims=one["shape"],
            )
            for one in told.get(kind, ())
        ]
        for kind in ("inputs", "outputs")
    }
    return ModelConfig(
        name=told.get("name", ""),
        platform=told.get("platform", ""),
        max_batch_size=0,
        input=tensors["inputs"],
        output=tensors["outputs"],
    )


async def _asked(endpoint: EndpointController, path: str) -> tuple[int, bytes]:
    """What a replica answers to a GET: its status and JSON. Raises ApiError when there is none that can."""
    for replica in endpoint.ready_replicas():
        try:
            timeout = aiohttp.ClientTimeout(total=METADATA_TIMEOUT_S)
            with replica.use():
                async with replica.session.get(path, timeout=timeout) as response:
                    return response.status, await response.read()
        except (aiohttp.ClientError, OSError, ReplicaLost, TimeoutError):
            continue
    state = f"{endpoint.state}: {endpoint.reason}" if endpoint.reason else endpoint.state
    raise ApiError(503, f"no replica of model {endpoint.name!r} can answer now. It is {state}.", retry_after_s=2)
