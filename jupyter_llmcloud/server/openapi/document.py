"""The OpenAPI document, made from the routes: their paths, the operations of their methods, the structs of these."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import msgspec

from jupyter_llmcloud.protocol.http import events
from jupyter_llmcloud.protocol.http.base import Body, Query, Refusal, Response
from jupyter_llmcloud.protocol.http.clusters import Cluster
from jupyter_llmcloud.protocol.http.endpoints import Endpoint
from jupyter_llmcloud.protocol.http.gateway import (
    InferenceRefusal,
    InferenceRequest,
    Model,
    Models,
    OpenInferenceRefusal,
    OpenInferenceRequest,
)
from jupyter_llmcloud.protocol.http.keys import Key
from jupyter_llmcloud.protocol.http.runs import Run
from jupyter_llmcloud.protocol.http.worlds import World
from jupyter_llmcloud.server.api.base import RESOURCE, STATUS
from jupyter_llmcloud.server.api.operation import Operation
from jupyter_llmcloud.server.api.status import package_version

JSON, STREAM, BINARY = "application/json", "text/event-stream", "application/octet-stream"
METHODS = ("get", "post", "put", "patch", "delete")
ITEMS = (Cluster, World, Run, Endpoint, Key)  # of the topics of the events
GATEWAY = "/llmcloud/v1/"
OPEN_INFERENCE = "/llmcloud/v2"
MULTIPART = "multipart/form-data"
_REF = "#/components/schemas/{name}"
_UPLOAD = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "contentMediaType": BINARY, "description": "Rows of JSON, one a line."},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
    "required": ["file", "purpose"],
}
_OF_MEDIA: dict[str, dict[str, Any]] = {JSON: {"type": "object"}, MULTIPART: _UPLOAD}
_GROUP = re.compile(r"\((?!\?:)((?:[^()\[\]]|\[[^\]]*\])*)\)")

_OF_MODELS = (InferenceRefusal, InferenceRequest, Model, Models, OpenInferenceRefusal, OpenInferenceRequest)

Routes = Iterable[tuple[str, type[Any], Any]]


@dataclass(frozen=True)
class DocumentedRoute:
    """A path with a method that is answered there.

    Attributes:
        path: as OpenAPI writes it: /llmcloud/api/runs/{name}.
        parameters: the regular expressions of its parts that vary, by their names.
        function: what answers.
    """

    path: str
    method: str
    parameters: Mapping[str, str]
    function: Callable[..., Any]

    @property
    def operation(self) -> Operation | None:
        """What the function takes and answers, where that is said."""
        return getattr(self.function, "llmcloud_operation", None)


def walk(routes: Routes) -> Iterator[DocumentedRoute]:
    """Every method of every route."""
    for pattern, handler, _ in routes:
        for method in METHODS:
            function = getattr(handler, method)
            if function.__name__ != "_unimplemented_method":
                yield _route(pattern, method, function)


def _route(pattern: str, method: str, function: Any) -> DocumentedRoute:
    names = iter([name for name in inspect.signature(function).parameters if name not in ("self", "body", "query")])
    parameters: dict[str, str] = {}

    def part(found: re.Match[str]) -> str:
        name = next(names)
        if re.fullmatch(r"[\w/]+", found[1]):
            return found[1]  # the same for every request
        parameters[name] = found[1]
        return f"{{{name}}}"

    return DocumentedRoute(_GROUP.sub(part, pattern).replace("\\.", "."), method, parameters, function)


def document(routes: Routes, base_url: str = "/") -> dict[str, Any]:
    """The document of these routes, as a server tells it that is reached under `base_url`."""
    found = list(walk(routes))
    schemas = _Schemas([kind for route in found for kind in structs_of(route)])
    paths: dict[str, dict[str, Any]] = {}
    for route in found:
        paths.setdefault(route.path, {})[route.method] = _describe(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jupyter-llmcloud",
            "version": package_version(),
            "description": "Clusters, worlds, runs, endpoints and keys of a Jupyter server. Times are seconds since the"
            " epoch, sizes bytes. A number that JSON does not have (NaN, infinity) is null.",
            "license": {"name": "BSD-3-Clause", "identifier": "BSD-3-Clause"},
        },
        "servers": [{"url": base_url.rstrip("/") or "/"}],
        "security": [{"jupyterToken": []}, {"jupyterCookie": []}],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "responses": {
                "Refusal": _refusal(Refusal, _codes()),
                "InferenceRefusal": _refusal(InferenceRefusal, ""),
                "OpenInferenceRefusal": _refusal(OpenInferenceRefusal, ""),
            },
            "securitySchemes": _SECURITY,
        },
    }


_SECURITY = {
    "jupyterToken": {"type": "http", "scheme": "bearer", "description": "The token of the Jupyter server."},
    "jupyterCookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": "_xsrf",
        "description": "As Jupyter signs a browser in; a change also needs the header X-XSRFToken with this cookie.",
    },
    "key": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "sk-llmc-...",
        "description": "A scoped key (POST /llmcloud/api/keys): opens the models in its scopes, and nothing else.",
    },
}
_GATEWAY_SECURITY: list[dict[str, list[str]]] = [{"key": []}, {"jupyterToken": []}]


def _codes() -> str:
    codes = ", ".join(f"{kind.code} {status}" for kind, status in STATUS.items())
    return f"By the class of the error: {codes}, others 500. Who may not: 403."


def _refusal(kind: type[Response], more: str) -> dict[str, Any]:
    what = f"It is refused. {more}".strip()
    return {"description": what, "content": _content(kind)}


# --- the structs ---


class _Schemas:
    """The schemas of structs, those of the messages of the events among them."""

    def __init__(self, kinds: Iterable[type]) -> None:
        unions = {"ClientMessage": events.ClientMessage, "ServerMessage": events.ServerMessage}
        more = (Refusal, *_OF_MODELS, *ITEMS)
        structs = list(dict.fromkeys([*kinds, *more]))
        found, components = msgspec.json.schema_components([*structs, *unions.values()], ref_template=_REF)
        self.components: dict[str, Any] = {**components, **dict(zip(unions, found[len(structs) :], strict=True))}
        for kind in _all_structs():
            if kind.__name__ in self.components and _tells_all(kind):
                schema = self.components[kind.__name__]
                schema["required"] = list(schema["properties"])
        self._name_items()
        self.components = dict(sorted(self.components.items()))

    def _name_items(self) -> None:
        """The items of the topics are those that REST gives."""
        item = {"anyOf": [{"$ref": _REF.format(name=kind.__name__)} for kind in ITEMS]}
        self.components["Snapshot"]["properties"]["items"]["items"] = item
        self.components["Changed"]["properties"]["item"] = item

    def query(self, kind: type[Query]) -> Iterator[dict[str, Any]]:
        """The parameters that the fields of a query are; what is null is left out there."""
        yield from query_parameters(self.components[kind.__name__])


def query_parameters(query: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters of an operation that the fields of a query are, by the schema of that."""
    for name, schema in query["properties"].items():
        about = {"name": name, "in": "query", "description": schema.get("description", "")}
        given = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
        yield {**about, "schema": {key: value for key, value in given[0].items() if key != "description"}}


def path_parameters(route: DocumentedRoute) -> list[dict[str, Any]]:
    """The parts of its path that vary."""
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": f"^{regex}$"}}
        for name, regex in route.parameters.items()
    ]


def _content(kind: type[msgspec.Struct] | str) -> dict[str, Any]:
    """The content of a request or a reply."""
    if isinstance(kind, str):
        return {kind: {"schema": _OF_MEDIA.get(kind, {"type": "string"})}}
    return {JSON: {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _all_structs(of: type[msgspec.Struct] = msgspec.Struct) -> Iterator[type[msgspec.Struct]]:
    for kind in of.__subclasses__():
        if kind.__module__.startswith("jupyter_llmcloud.protocol.http"):
            yield kind
        yield from _all_structs(kind)


def _tells_all(kind: type[msgspec.Struct]) -> bool:
    """Whether what has its default is told as well, as in all that the server says."""
    asked = issubclass(kind, Body | Query | InferenceRequest) or kind in get_args(events.ClientMessage)
    return not asked and not kind.__struct_config__.omit_defaults


def structs_of(route: DocumentedRoute) -> Iterator[type]:
    """What its method takes and answers."""
    if (told := route.operation) is not None:
        kinds = (told.body, told.query, *told.replies.values())
        yield from (kind for kind in kinds if isinstance(kind, type))
    if (reply := getattr(route.function, "llmcloud_reply", None)) is not None:
        yield reply


# --- the operations ---


def _describe(route: DocumentedRoute, schemas: _Schemas) -> dict[str, Any]:
    told = route.operation
    summary, _, description = inspect.cleandoc(route.function.__doc__ or "").partition("\n")
    name = re.sub(r"\W+", "_", route.path.replace("/llmcloud/", "").replace("api/", "")).strip("_")
    described: dict[str, Any] = {
        "operationId": f"{route.method}_{name}",
        "summary": summary,
        "tags": [_tag(route.path)],
    }
    parameters = path_parameters(route)
    if told is not None and told.query is not None:
        parameters += schemas.query(told.query)
    if parameters:
        described["parameters"] = parameters
    if description:
        described["description"] = " ".join(description.split())
    if (access := getattr(route.function, "llmcloud_access", None)) is not None:
        described["x-jupyter-authorization"] = {"action": access[0], "resource": RESOURCE}
    else:
        described["security"] = []
    if told is None:
        return {**described, **_not_said(route)}
    said = taken_and_given(told)
    if route.path.startswith(GATEWAY):
        said["responses"]["default"] = {"$ref": "#/components/responses/InferenceRefusal"}
        said["security"] = _GATEWAY_SECURITY
    return {**described, **said}


def _tag(path: str) -> str:
    words = path.removeprefix("/llmcloud/").split("/")
    return words[1] if words[0] == "api" else {"v1": "models", "v2": "inference"}.get(words[0], "status")


def taken_and_given(told: Operation) -> dict[str, Any]:
    """The body and the answers of an operation."""
    said: dict[str, Any] = {"responses": {}}
    if told.body is not None:
        required = isinstance(told.body, str) or any(field.required for field in msgspec.structs.fields(told.body))
        said["requestBody"] = {"content": _content(told.body), "required": required}
    for status, kind in told.replies.items():
        about = inspect.cleandoc(kind.__doc__ or "") if isinstance(kind, type) else told.summary
        said["responses"][str(status)] = {"description": about, "content": _content(kind)}
    said["responses"]["default"] = {"$ref": "#/components/responses/Refusal"}
    return said


def _not_said(route: DocumentedRoute) -> dict[str, Any]:
    """A method that is no operation: of the OpenAI surface, or a websocket."""
    if route.path.startswith(OPEN_INFERENCE):
        return _of_open_inference(route)
    if not route.path.startswith(GATEWAY):
        return {"responses": {"101": {"description": "A websocket: see ClientMessage and ServerMessage."}}}
    said: dict[str, Any] = {"security": _GATEWAY_SECURITY}
    answer: dict[str, Any] = {JSON: {}, STREAM: {}}
    if route.path.startswith(f"{GATEWAY}models"):
        answer = _content(Model if route.parameters else Models)
    elif route.method != "post":
        answer = {JSON: {}}
    else:
        said["requestBody"] = {"content": _content(InferenceRequest), "required": True}
    said["responses"] = {
        "200": {"description": "As OpenAI's API answers.", "content": answer},
        "default": {"$ref": "#/components/responses/InferenceRefusal"},
    }
    return said


def _of_open_inference(route: DocumentedRoute) -> dict[str, Any]:
    """A method of the Open Inference Protocol."""
    said: dict[str, Any] = {"security": [{"key": []}, {"jupyterToken": []}]}
    reply = getattr(route.function, "llmcloud_reply", None)
    answer: dict[str, Any] = {JSON: {}} if reply is None else _content(reply)
    if route.method == "post":
        binary: dict[str, Any] = {BINARY: {}}
        said["requestBody"] = {"content": {**_content(OpenInferenceRequest), **binary}, "required": True}
        answer |= {STREAM: {}} if route.path.endswith("stream") else binary
    said["responses"] = {
        "200": {"description": "As the Open Inference Protocol answers.", "content": answer},
        "default": {"$ref": "#/components/responses/OpenInferenceRefusal"},
    }
    if reply is not None and reply.__name__ == "ModelReady":
        said["responses"]["503"] = {"description": "It is not ready.", "content": answer}
    return said
