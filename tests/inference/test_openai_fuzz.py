"""Bodies made from `/llmcloud/v1/openapi.json`, as they should be and bent: an answer or a 4xx, and never a 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate

from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.engines.loading import load_model
from jupyter_llmcloud.inference.openai.chat.templates import Templates
from jupyter_llmcloud.inference.openai.served_model import ServedModel
from jupyter_llmcloud.server.gateway.open_requests import INFERENCE_ROUTES
from jupyter_llmcloud.server.openapi.document import GATEWAY, walk
from jupyter_llmcloud.server.openapi.openai_surface import BODIES, openai_document
from jupyter_llmcloud.server.routes import ROUTES
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_models import CHAT_TEMPLATE, save_tiny_llama

TOKEN = "the-bearer"
DOCUMENT = openai_document(routes=ROUTES)
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
Ask = Callable[[str, bytes], tuple[int, Any]]
ODD: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A replica over a scripted engine, on a loop of its own."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), chat_template=CHAT_TEMPLATE, context_length=512)
    loaded = load_model(folder)
    templates = Templates()
    templates.prepare()
    with asyncio.Runner() as runner:
        status = ReplicaStatus("endpoint", "tiny", 8)
        application = Application(status, TOKEN)
        engine = ScriptedEngine(loaded, "Good day")
        application.model, status.state = ServedModel(loaded, engine, "tiny", templates=templates), "ready"

        async def opened() -> TestClient[Any, Any]:
            client = TestClient(TestServer(application.build()))
            await client.start_server()
            return client

        client = runner.run(opened())

        async def post(route: str, body: bytes) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with asyncio.timeout(60), client.post(f"/v1/{route}", data=body, headers=headers) as response:
                text = await response.text()
                if response.content_type == "text/event-stream":
                    assert text.endswith("data: [DONE]\n\n") or '"error"' in text
                    return response.status, text
                return response.status, json.loads(text)

        yield lambda route, body: runner.run(post(route, body))
        runner.run(client.close())
    templates.close()


def made(schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a schema as msgspec writes it; deep ones are small."""
    if "$ref" in schema:
        return st.deferred(lambda: made(SCHEMAS[schema["$ref"].rpartition("/")[2]], depth + 1))
    if "anyOf" in schema:
        return st.one_of([made(one, depth) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([made({**schema, "type": one}, depth) for one in kind])
    if kind == "object" and "properties" in schema:
        required = {name: made(schema["properties"][name], depth) for name in schema.get("required", ())}
        others = {name: made(one, depth) for name, one in schema["properties"].items() if name not in required}
        few = st.lists(st.sampled_from(sorted(others)), max_size=3, unique=True) if others else st.just([])
        return few.flatmap(lambda names: st.fixed_dictionaries({**required, **{name: others[name] for name in names}}))
    if kind == "object":
        return st.dictionaries(st.text(max_size=6), ODD, max_size=3)
    if kind == "array":
        least, most = schema.get("minItems", 0), min(schema.get("maxItems", 3), max(3, schema.get("minItems", 0)))
        return st.lists(made(schema.get("items", {}), depth + 1), min_size=least, max_size=most)
    if kind == "integer":
        low, high = schema.get("minimum", -(2**40)), schema.get("maximum", 2**40)
        return st.integers(low, min(high, low + 40)) | st.integers(low, high)
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -1e6)), schema.get("maximum", 1e6)
        return st.floats(low, high, exclude_min="exclusiveMinimum" in schema)
    if kind == "string":
        if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True)
        return st.text(min_size=schema.get("minLength", 0), max_size=max(12, schema.get("minLength", 0)))
    return {"boolean": st.booleans(), "null": st.none()}.get(str(kind), ODD)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    route = draw(st.sampled_from(sorted(BODIES)))
    body: dict[str, Any] = draw(made(SCHEMAS[BODIES[route][0].__name__]))
    if draw(st.integers(0, 9)):  # mostly the model that is there
        body["model"] = "tiny"
    if not draw(st.integers(0, 2)):  # some with one value of any kind
        body[draw(st.sampled_from([*sorted(body), "unknown"]))] = draw(ODD)
    return route, body


def test_the_document_is_openapi_and_has_every_route() -> None:
    validate(DOCUMENT)
    told = {
        (path, method) for path, methods in DOCUMENT["paths"].items() for method in methods if method != "parameters"
    }
    served = {
        ("/" + route.path.removeprefix(GATEWAY), route.method)
        for route in walk(ROUTES)
        if route.path.startswith(GATEWAY)
        and route.path != f"{GATEWAY}openapi.json"
        and "/deployments/" not in route.path  # the same by Azure's paths
    }
    assert {(path.replace("{model}", "{name}"), method) for path, method in told} == served
    assert {*BODIES} == {*INFERENCE_ROUTES}


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(asked=bodies())
def test_whatever_is_asked_is_answered_or_refused_in_words(ask: Ask, asked: tuple[str, dict[str, Any]]) -> None:
    route, body = asked
    status, reply = ask(route, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert status < 500, (route, body, reply)
    if status != 200:
        assert reply["error"]["message"], (route, body)
