"""The HTTP routes of a replica: /livez, /readyz, /stats and the OpenAI ones below /v1."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
from aiohttp import ClientConnectionResetError, hdrs, web

from jupyter_llmcloud.core.serving.endpoint.response_id import REPLICA_HEADER
from jupyter_llmcloud.core.serving.models.model_kind import GENERATOR, ModelKind, not_a_generator
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.changes import Changes
from jupyter_llmcloud.inference.engines.base import EngineError
from jupyter_llmcloud.inference.external.forward import Forward
from jupyter_llmcloud.inference.open_inference.routes import OpenInferenceRoutes, ServedPredictor
from jupyter_llmcloud.inference.openai.asking import ask_chat, ask_completion
from jupyter_llmcloud.inference.openai.completion import Completion, GenerationRequest
from jupyter_llmcloud.inference.openai.embedding.answers import detokenize, embed, embedding_prompts, tokenize
from jupyter_llmcloud.inference.openai.responses import TokenUsage, encode, event
from jupyter_llmcloud.inference.openai.responses_api.ask import ask_response
from jupyter_llmcloud.inference.openai.responses_api.listing import page_of_items
from jupyter_llmcloud.inference.openai.responses_api.store import ResponseStore
from jupyter_llmcloud.inference.openai.served_model import ServedModel
from jupyter_llmcloud.inference.usages import Usages, behind_the_last_event

if TYPE_CHECKING:
    from jupyter_llmcloud.inference.openai.embedding.encoders import ServedEncoder

log = logging.getLogger(__name__)

MAX_BODY = 16 * 2**20
_LONG_BODY = 2**13  # bytes whose tokens take a millisecond or more
_QUEUE_FACTOR = 4
_MAX_RENDERING = 32
_RETRY_AFTER_S = 1.0
USAGE_TIMEOUT_S = 2.0
WITHOUT_EFFECT = "X-LLMC-Without-Effect"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class ReplicaStatus:
    """What the replica is doing and has done.

    Attributes:
        state: loading, ready, draining or failed.
        reason: why it failed.
        num_sequences: gauge of the sequences that were admitted and not ended.
        num_open: gauge of the requests being answered.
    """

    endpoint: str
    served_name: str
    max_concurrent: int
    state: str = "loading"
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    num_open: int = 0
    num_sequences: int = 0
    num_requests: int = 0
    num_refused: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    @property
    def max_sequences(self) -> int:
        """Sequences that may be here at once: those in the batch and those that wait for a place in it."""
        return self.max_concurrent * _QUEUE_FACTOR


class Application:
    """The routes over one model. When that is ready, one is set: model, external, encoder or predictions.served.

    Attributes:
        kind: what the model is for, as in `core.serving.models.model_kind`.
        model: a generator of our own; external: one of another server; predictions: what generates no text;
            encoder: what only embeds.
    """

    def __init__(self, status: ReplicaStatus, token: str) -> None:
        self.status = status
        self.model: ServedModel | None = None
        self.kind: ModelKind = GENERATOR
        self.external: Forward | None = None
        self.encoder: ServedEncoder | None = None
        self.predictions = OpenInferenceRoutes(status, self._why_not_ready)
        self._usages = Usages()
        self._responses = ResponseStore()
        self._rendering = ThreadPoolExecutor(_MAX_RENDERING, thread_name_prefix="chat")
        self._token = token.encode()

    def build(self) -> web.Application:
        """An aiohttp application. Run it with `handler_cancellation=True`: hanging up cancels a request."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._errors, self._authorise, self._pass_on])
        app.on_cleanup.append(self._close)
        app.router.add_get("/livez", self.livez)
        app.router.add_get("/readyz", self.readyz)
        app.router.add_get("/stats", self.stats)
        app.router.add_get("/usage/{request_id}", self.usage)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/responses", self.responses)
        app.router.add_get("/v1/responses/{response_id}", self.stored_response)
        app.router.add_delete("/v1/responses/{response_id}", self.remove_response)
        app.router.add_get("/v1/responses/{response_id}/input_items", self.input_items)
        app.router.add_post("/v1/embeddings", self.embeddings)
        app.router.add_post("/v1/tokenize", self.tokenize)
        app.router.add_post("/v1/detokenize", self.detokenize)
        self.predictions.add_to(app)
        Changes(self._ready_model).add_to(app)
        return app

    def serve_predictions(self, served: ServedPredictor) -> None:
        """The model that generates no text is ready."""
        self.predictions.served = served

    async def end_predictions(self) -> None:
        """Close that model, if there is one."""
        if self.predictions.served is not None:
            await self.predictions.served.close()

    async def _close(self, _: web.Application) -> None:
        self._rendering.shutdown(wait=False, cancel_futures=True)

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return _error(error)
        except RecursionError:
            return _error(ApiError(400, "The body is nested too deeply.", code="invalid_json"))
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}"
            return _error(ApiError(error.status, message), allow=error.headers.get(hdrs.ALLOW))
        except EngineError as error:
            self.status.num_failed += 1
            return _error(ApiError(503, str(error), code="engine_failed", retry_after_s=_RETRY_AFTER_S))
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return _error(ApiError(500, "The replica failed on this; its log says why.", code="internal"))

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != "/livez":
            scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                message = "This replica needs its own bearer token. Ask through the endpoint's URL instead."
                raise ApiError(401, message, code="invalid_api_key")
        return await handler(request)

    @web.middleware
    async def _pass_on(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What another server generates is asked there, whatever of OpenAI's API it has."""
        if self.external is None or request.method != "POST" or not request.path.startswith("/v1/"):
            return await handler(request)
        latest = TokenUsage()

        def note(usage: TokenUsage) -> None:
            nonlocal latest
            latest = usage

        with self._usages.counting(request.headers.get("X-Request-Id", "")) as counted:
            try:
                return await self.external.answer(request, note)
            finally:
                counted(latest)
                self.status.num_prompt_tokens += latest.num_prompt
                self.status.num_generated_tokens += latest.num_generated

    async def livez(self, request: web.Request) -> web.Response:
        """Whether the process answers at all."""
        return _json({"state": "alive", "pid": os.getpid()})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 when requests are welcome, 503 while loading or draining, 500 when nothing can be served."""
        status = self.status
        body = {"state": status.state, "endpoint": status.endpoint, "pid": os.getpid()}
        if status.state == "ready":
            refused = {} if self.model is None else getattr(self.model.engine, "refused", {})
            return _json({"adapters_refused": refused, **body, **status.details, "memory": self._memory()})
        if status.state == "failed":
            return _json({**body, "reason": status.reason}, status=500)
        return _json(body, status=503)

    def _memory(self) -> dict[str, int]:
        """Bytes that this replica takes now, and how far the part that grows may grow."""
        process = psutil.Process()
        memory = {"process_bytes": sum(one.memory_info().rss for one in [process, *_children(process)])}
        if self.model is not None:
            engine = self.model.engine.stats()
            named = ("cache_bytes", "max_cache_bytes", "prefix_bytes")
            memory |= {name: getattr(engine, name) for name in named}
        return memory

    async def stats(self, request: web.Request) -> web.Response:
        """Gauges and counters."""
        status = self.status
        body: dict[str, Any] = {
            "state": status.state,
            "endpoint": status.endpoint,
            "model": status.served_name,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - status.started, 3),
            "max_concurrent": status.max_concurrent,
        }
        counted = [name for name in ReplicaStatus.__dataclass_fields__ if name.startswith("num_")]
        body |= {name: getattr(status, name) for name in counted}
        if self.model is not None:
            engine = self.model.engine.stats()
            body["engine"] = {
                "name": self.model.engine.name,
                "num_active": engine.num_active,
                "num_tokens": engine.num_tokens,
                "num_threads": self.model.engine.num_threads,
            }
            body["memory"] = self._memory()
        return _json(body)

    async def usage(self, request: web.Request) -> web.Response:
        """What the request with this id has cost, once it has ended; for streams that did not tell."""
        counted = await self._usages.of(request.match_info["request_id"], USAGE_TIMEOUT_S)
        if counted is None:
            raise ApiError(404, "No request with this id was answered here of late.", code="unknown_request")
        return _json(counted.body())

    async def models(self, request: web.Request) -> web.Response:
        """The one model that is served here."""
        status = self.status
        entry = {
            "id": status.served_name,
            "object": "model",
            "created": int(status.started),
            "owned_by": "jupyter-llmcloud",
        }
        return _json({"object": "list", "data": [entry]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._answer(request, "completion")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._answer(request, "chat")

    async def responses(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/responses."""
        return await self._answer(request, "response")

    async def stored_response(self, request: web.Request) -> web.Response:
        """GET /v1/responses/ID: one that was given before."""
        response_id, owner = request.match_info["response_id"], request.headers.get("X-LLMC-Key", "")
        return web.Response(body=self._responses.read(response_id, owner), content_type="application/json")

    async def remove_response(self, request: web.Request) -> web.Response:
        """DELETE /v1/responses/ID."""
        response_id = request.match_info["response_id"]
        self._responses.remove(response_id, request.headers.get("X-LLMC-Key", ""))
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def input_items(self, request: web.Request) -> web.Response:
        """GET /v1/responses/ID/input_items."""
        response_id = request.match_info["response_id"]
        items = self._responses.input_of(response_id, request.headers.get("X-LLMC-Key", ""))
        return _json(page_of_items(items, response_id, request.query))

    async def embeddings(self, request: web.Request) -> web.Response:
        """POST /v1/embeddings."""
        model = self.encoder or self._ready_model()
        asked, prompts = await asyncio.to_thread(embedding_prompts, model, await request.read())
        with self._counted(request) as usage:
            reply = await embed(model, asked, prompts)
            usage.num_prompt = reply["usage"]["prompt_tokens"]
            return _json(reply)

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /v1/tokenize: no tokens are generated."""
        return await self._told(request, tokenize)

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /v1/detokenize."""
        return await self._told(request, detokenize)

    async def _told(self, request: web.Request, tell: Callable[[Any, bytes], Any]) -> web.Response:
        model, body = self.encoder or self._ready_model(), await request.read()
        with self._counted(request):
            return _json(await asyncio.get_running_loop().run_in_executor(self._rendering, tell, model, body))

    @contextmanager
    def _counted(self, request: web.Request) -> Iterator[TokenUsage]:
        usage = TokenUsage()
        with self._usages.counting(request.headers.get("X-Request-Id", "")) as counted:
            try:
                yield usage
            finally:
                counted(usage)
                self.status.num_prompt_tokens += usage.num_prompt

    async def _answer(self, request: web.Request, route: str) -> web.StreamResponse:
        model = self._ready_model()
        body = await request.read()
        ask = await self._check(model, route, body, request.headers)
        with self._admitted(ask), self._usages.counting(request.headers.get("X-Request-Id", "")) as counted:
            answer = Completion(model, ask)
            try:
                if ask.stream:
                    return await self._stream(request, answer, _said_of(ask))
                return _json(await answer.whole(), headers=_said_of(ask))
            except asyncio.CancelledError:  # the client has hung up
                self.status.num_cancelled += 1
                raise
            finally:
                answer.close()
                counted(answer.usage)
                self.status.num_prompt_tokens += answer.usage.num_prompt
                self.status.num_generated_tokens += answer.usage.num_generated

    async def _check(
        self, model: ServedModel, route: str, body: bytes, headers: Mapping[str, str]
    ) -> GenerationRequest:
        """The request, checked. What takes a while is done in a thread: streams of others do not feel it."""
        if route == "chat":  # whose template may take as long as it is let
            return await asyncio.get_running_loop().run_in_executor(self._rendering, ask_chat, model, body)
        if route == "response":
            owner, replica = headers.get("X-LLMC-Key", ""), headers.get(REPLICA_HEADER, "")
            asking = partial(ask_response, model, body, self._responses, owner, replica)
            return await asyncio.get_running_loop().run_in_executor(self._rendering, asking)
        if (
            len(body) > _LONG_BODY
            or b'"structured_outputs"' in body
            or b'"response_format"' in body
            or b'"guided_' in body
        ):
            return await asyncio.to_thread(ask_completion, model, body, self.status.max_sequences)
        return ask_completion(model, body, self.status.max_sequences)

    def _why_not_ready(self) -> tuple[int, str]:
        if (self.model is not None or self.external is not None) and self.status.state == "ready":
            name = self.status.served_name
            return 400, f"model {name!r} generates text: ask it by /llmcloud/v1/completions or chat/completions."
        if self.encoder is not None:
            return (
                400,
                f"model {self.status.served_name!r} turns texts into vectors: ask it by /llmcloud/v1/embeddings.",
            )
        return 503, f"The replica is {self.status.state}. Try again."

    def _ready_model(self) -> ServedModel:
        if self.model is None and (self.predictions.served is not None or self.encoder is not None):
            message = not_a_generator(self.status.served_name, self.kind)
            raise ApiError(400, message, param="model", code="not_a_generator")
        if self.external is not None:
            message = f"This is not possible with the engine {self.external.server.engine}."
            raise ApiError(409, message, code="not_possible")
        if self.model is None or self.status.state != "ready":
            message = f"The replica is {self.status.state}. Try again."
            raise ApiError(503, message, code="not_ready", retry_after_s=_RETRY_AFTER_S)
        return self.model

    @contextmanager
    def _admitted(self, ask: GenerationRequest) -> Iterator[None]:
        status, wanted = self.status, ask.num_sequences
        if wanted > status.max_sequences:
            message = f"{wanted} sequences in one request: at most {status.max_sequences}. Send several requests."
            raise ApiError(400, message, param="prompt", code="invalid_value")
        if status.num_sequences + wanted > status.max_sequences:
            status.num_refused += 1
            message = f"The replica is full ({status.num_sequences} sequences). Try again in a moment."
            raise ApiError(429, message, code="overloaded", retry_after_s=_RETRY_AFTER_S)
        status.num_requests += 1
        status.num_open += 1
        status.num_sequences += wanted
        try:
            yield
        finally:
            status.num_open -= 1
            status.num_sequences -= wanted

    async def _stream(self, request: web.Request, answer: Completion, headers: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                **headers,
                hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
                hdrs.CACHE_CONTROL: "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        try:
            await response.prepare(request)
            await self._send(response, answer)
            await response.write_eof(behind_the_last_event(request, answer.usage))
        except (ClientConnectionResetError, ConnectionResetError):
            self.status.num_cancelled += 1
        return response

    async def _send(self, response: web.StreamResponse, answer: Completion) -> None:
        try:
            async with aclosing(answer.events()) as events:
                async for chunk in events:
                    await response.write(chunk)
        except (ClientConnectionResetError, ConnectionResetError):
            raise
        except Exception as error:
            # The status line is gone: what is left to tell it is an event, and no [DONE].
            self.status.num_failed += 1
            await response.write(event(_broken_off(error).body()))


def _children(process: psutil.Process) -> list[psutil.Process]:
    """Those that render chat templates."""
    with suppress(psutil.Error):
        return [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    return []


def _broken_off(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_failed")
    log.error("an answer broke off", exc_info=error)
    message = f"The answer broke off: {type(error).__name__}: {error}. The log of the replica says more."
    return ApiError(500, message, code="internal")


def _said_of(ask: GenerationRequest) -> dict[str, str]:
    """What is said of parameters that change nothing."""
    return {WITHOUT_EFFECT: ", ".join(ask.ignored)} if ask.ignored else {}


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=encode(body), status=status, content_type="application/json", headers=headers)


def _error(error: ApiError, allow: str | None = None) -> web.Response:
    response = _json(error.body(), error.status)
    response.headers.update(error.headers())
    if allow:
        response.headers[hdrs.ALLOW] = allow
    return response
