"""`/llmcloud/v1`, as far as the server itself reads and answers there; the rest is OpenAI's API, spoken by replicas."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jupyter_llmcloud.protocol.http.base import Response


class InferenceRequest(msgspec.Struct, kw_only=True, frozen=True):
    """What the gateway reads of a request, which is one of OpenAI's API; all else is the replica's to judge."""

    model: Annotated[str, Meta(description="Name of an endpoint.")]
    stream: Annotated[bool | None, Meta(description="Whether to answer by server-sent events.")] = False


class Model(Response, frozen=True):
    """An endpoint in OpenAI's words."""

    id: Annotated[str, Meta(description="Name of the endpoint.")]
    created: Annotated[int, Meta(description="Seconds since the epoch.")]
    state: Annotated[str, Meta(description="starting or ready.")]
    revision: Annotated[str, Meta(description="A fingerprint of what is served.")]
    object: Literal["model"] = "model"
    owned_by: str = "jupyter-llmcloud"


class Models(Response, frozen=True):
    """The endpoints that whoever asks may use."""

    data: list[Model]
    object: Literal["list"] = "list"


class ServerMetadata(Response, frozen=True):
    """The server, in the words of the Open Inference Protocol."""

    name: str
    version: str
    extensions: list[str]


class ServerHealth(Response, frozen=True, omit_defaults=True):
    """Whether the server lives, or takes requests."""

    live: bool | None = None
    ready: bool | None = None


class ModelReady(Response, frozen=True):
    """Whether a model answers."""

    name: str
    ready: bool


class ConfiguredTensor(Response, frozen=True):
    """An input or output of a model in its configuration."""

    name: str
    data_type: Annotated[str, Meta(description="Such as TYPE_INT64, or TYPE_STRING for BYTES.")]
    dims: Annotated[list[int], Meta(description="Its shape; -1: as long as it comes.")]


class ModelConfig(Response, frozen=True):
    """What a model takes and gives, in the words of Triton's model configuration."""

    name: str
    platform: str
    max_batch_size: Annotated[int, Meta(description="0: the shapes are whole, with what is batched in them.")]
    input: list[ConfiguredTensor]
    output: list[ConfiguredTensor]


class IndexedModel(Response, frozen=True):
    """A model in Triton's list of models."""

    name: str
    version: str
    state: Annotated[str, Meta(description="READY, or UNAVAILABLE while no replica of it answers.")]
    reason: str


class OpenInferenceRequest(msgspec.Struct, kw_only=True, frozen=True):
    """A request by the Open Inference Protocol, as its replica reads it; tensors may follow it as binary data."""

    inputs: Annotated[
        Any, Meta(description="Tensors with name, shape, datatype and data; or any other JSON value for the model.")
    ]
    id: Annotated[str, Meta(description="Told again in the answer.")] = ""
    parameters: dict[str, Any] | None = None
    outputs: Annotated[list[dict[str, Any]] | None, Meta(description="The outputs wanted, by name; left out: all.")] = (
        None
    )


class OpenInferenceRefusal(Response, frozen=True):
    """Why a request by the Open Inference Protocol was not answered."""

    error: str


class InferenceError(Response, frozen=True):
    """What went wrong, in OpenAI's words."""

    message: str
    type: Annotated[str, Meta(description="Such as invalid_request_error.", examples=["rate_limit_error"])]
    param: Annotated[str | None, Meta(description="The parameter at fault, when there is one.")]
    code: Annotated[str | None, Meta(description="A short reason, such as context_length_exceeded.")]


class InferenceRefusal(Response, frozen=True):
    """Why a request to a model was not answered."""

    error: InferenceError
