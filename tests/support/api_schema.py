"""Holds every JSON answer of a server against the OpenAPI document: the tests of the server ask through this."""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from jupyter_llmcloud.server.openapi.document import JSON, document
from jupyter_llmcloud.server.routes import ROUTES

DOCUMENT = document(ROUTES)
_NAME = "urn:jupyter-llmcloud:openapi"
_REGISTRY: Any = Registry().with_resource(_NAME, Resource(DOCUMENT, DRAFT202012))


class Undescribed(AssertionError):
    """A server answered what the document does not say."""


@cache
def validator(pointer: str) -> Draft202012Validator:
    """Of the schema to which `pointer` points in the document."""
    return Draft202012Validator({"$ref": f"{_NAME}{pointer}"}, registry=_REGISTRY)


def described(method: str, path: str, status: int) -> dict[str, Any] | None:
    """The response that the document has for a request; None for a path or a method that it has not."""
    for template, operations in DOCUMENT["paths"].items():
        if method.lower() in operations and re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), path):
            responses = operations[method.lower()]["responses"]
            response = responses.get(str(status), responses.get("default", {}))
            name = response.get("$ref", "").rpartition("/")[2]
            return DOCUMENT["components"]["responses"][name] if name else response
    return None


def check(method: str, path: str, status: int, body: Any) -> None:
    """Raises Undescribed when the answer is not what the document says of it."""
    response = described(method, path, status)
    if response is None or JSON not in response.get("content", {}):
        raise Undescribed(f"{method} {path}: the document has no JSON answer with status {status}")
    schema = response["content"][JSON].get("schema", {})
    errors = validator(schema["$ref"]).iter_errors(body) if "$ref" in schema else ()
    for error in errors:
        raise Undescribed(f"{method} {path} {status}: at {error.json_path}: {error.message:.300}")


async def check_answer(answer: httpx.Response) -> None:
    """A hook of httpx: JSON that our routes answer is as the document says."""
    path = "/llmcloud/" + urlsplit(str(answer.request.url)).path.partition("/llmcloud/")[2]
    known = described(answer.request.method, path, answer.status_code) is not None
    if known and answer.headers.get("Content-Type", "").partition(";")[0] == JSON:
        await answer.aread()
        check(answer.request.method, path, answer.status_code, answer.json())
