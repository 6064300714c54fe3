"""`/llmcloud/v1/openapi.json`: the OpenAI surface alone, as it is decoded, for clients and fuzzers of it."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.protocol.http.gateway import InferenceRefusal, Model, Models
from jupyter_llmcloud.protocol.openai.chat import ChatRequest
from jupyter_llmcloud.protocol.openai.completions import CompletionRequest
from jupyter_llmcloud.protocol.openai.embeddings import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from jupyter_llmcloud.protocol.openai.responses import DEFAULT_LISTED, MAX_LISTED, ResponseRequest
from jupyter_llmcloud.server.api.status import package_version
from jupyter_llmcloud.server.gateway.auth import GatewayHandler
from jupyter_llmcloud.server.gateway.operation import gateway_operation
from jupyter_llmcloud.server.openapi.document import (
    GATEWAY,
    JSON,
    STREAM,
    DocumentedRoute,
    Routes,
    path_parameters,
    query_parameters,
    structs_of,
    taken_and_given,
    walk,
)

# What each route takes, and in short what it does.
BODIES: dict[str, tuple[type[msgspec.Struct], str]] = {
    "chat/completions": (ChatRequest, "Answer a conversation."),
    "completions": (CompletionRequest, "Go on with a text, or score it."),
    "responses": (ResponseRequest, "Answer input items, or go on from an earlier response."),
    "embeddings": (EmbeddingRequest, "Turn texts into vectors."),
    "tokenize": (TokenizeRequest, "Tell the tokens of a text or a conversation."),
    "detokenize": (DetokenizeRequest, "Tell the text of tokens."),
}
_STREAMED = ("chat/completions", "completions", "responses")
_REF = "#/components/schemas/{name}"
_ERROR = {"$ref": "#/components/responses/InferenceRefusal"}
_HERE = f"{GATEWAY}openapi.json"
_OBJECT: dict[str, Any] = {JSON: {"schema": {"type": "object"}}}


def openai_document(base_url: str = "/", routes: Routes = ()) -> dict[str, Any]:
    """The document, as a server tells it that is reached under `base_url`.

    Args:
        routes: of the server: what it answers itself below `/llmcloud/v1` is told as well.
    """
    own = [route for route in walk(routes) if _is_told(route)]
    structs: list[Any] = [*(body for body, _ in BODIES.values()), InferenceRefusal, Model, Models]
    structs += dict.fromkeys(kind for route in own for kind in structs_of(route))
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REF)
    model, models = _content(Model), _content(Models)
    others = {
        "/models": _operation("get", "list_models", "List the models that may be asked.", models),
        "/models/{model}": {
            "parameters": [_part_of_path("model")],
            **_operation("get", "get_model", "Tell of a model.", model),
        },
        "/responses/{response_id}": {
            "parameters": [_part_of_path("response_id")],
            **_operation("get", "get_response", "Tell again a response that was given and stored.", _OBJECT),
            **_operation("delete", "delete_response", "Keep a response no longer.", _OBJECT),
        },
        "/responses/{response_id}/input_items": {
            "parameters": [_part_of_path("response_id"), *_of_pages()],
            **_operation("get", "list_input_items", "List what a stored response answers.", _OBJECT),
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "jupyter-llmcloud's OpenAI surface", "version": package_version()},
        "servers": [{"url": f"{base_url.rstrip('/')}/llmcloud/v1"}],
        "security": [{"key": []}],
        "paths": {**{f"/{route}": _asked(route) for route in BODIES}, **others, **_answered_here(own, schemas)},
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {"InferenceRefusal": {"description": "It is refused.", "content": _content(InferenceRefusal)}},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A scoped key, or the Jupyter token."}
            },
        },
    }


def _content(kind: type) -> dict[str, Any]:
    return {JSON: {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _asked(route: str) -> dict[str, Any]:
    body, summary = BODIES[route]
    answer: dict[str, Any] = dict(_OBJECT)
    if route in _STREAMED:
        answer[STREAM] = {}  # who checks streams by a schema holds each event against it, and these differ
    return {
        "post": {
            "operationId": route.replace("/", "_"),
            "summary": summary,
            "requestBody": {"required": True, "content": _content(body)},
            "responses": {"200": {"description": "As OpenAI's API answers.", "content": answer}, "default": _ERROR},
        }
    }


def _is_told(route: DocumentedRoute) -> bool:
    return route.path.startswith(GATEWAY) and route.path != _HERE and route.operation is not None


def _answered_here(routes: list[DocumentedRoute], schemas: dict[str, Any]) -> dict[str, Any]:
    """What the server answers itself: files, batches and feedback."""
    paths: dict[str, Any] = {}
    for route in routes:
        path, told = route.path.removeprefix(GATEWAY[:-1]), route.operation
        assert told is not None
        said = taken_and_given(told)
        said["responses"]["default"] = _ERROR
        parameters = path_parameters(route)
        if told.query is not None:
            parameters += query_parameters(schemas[told.query.__name__])
        name = f"{route.method}_{path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}"
        paths.setdefault(path, {})[route.method] = {
            "operationId": name, "summary": told.summary, "parameters": parameters, **said,
        }  # fmt: skip
    return paths


def _part_of_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _of_pages() -> list[dict[str, Any]]:
    """How a list is read in pages."""
    schemas: dict[str, dict[str, Any]] = {
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": DEFAULT_LISTED},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string"},
    }
    return [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in schemas.items()]


def _operation(method: str, name: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    answer = {"description": summary, "content": content}
    return {method: {"operationId": name, "summary": summary, "responses": {"200": answer, "default": _ERROR}}}


class OpenAIDocumentHandler(GatewayHandler):
    """What the OpenAI surface takes."""

    def initialize(self, routes: Routes, **shared: Any) -> None:  # type: ignore[override]
        """`routes` are those of this server."""
        super().initialize(**shared)
        self.routes = routes

    @gateway_operation("read", JSON)
    async def get(self) -> None:
        """The OpenAPI document of the OpenAI surface alone."""
        self.set_header("Content-Type", JSON)
        self.finish(msgspec.json.encode(openai_document(self.base_url, self.routes)))
