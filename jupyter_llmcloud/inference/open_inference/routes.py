"""Routes of the Open Inference Protocol in a replica, below /v2, and the stream of a model that answers in pieces."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import ClientConnectionResetError, hdrs, web

from jupyter_llmcloud.inference.open_inference.batching import QUEUE_FACTOR, Batcher, QueueFull
from jupyter_llmcloud.inference.open_inference.messages import (
    InferenceReply,
    InferRequest,
    json_reply,
    parse,
    plain,
    reply,
)
from jupyter_llmcloud.inference.open_inference.predictor import PredictionFailed, Predictor
from jupyter_llmcloud.inference.open_inference.tensors import InvalidInput

log = logging.getLogger(__name__)

HEADER_LENGTH = "Inference-Header-Content-Length"
VERSION = "1"
MAX_ROWS = 4096
_RETRY_AFTER = {"Retry-After": "1", "retry-after-ms": "1000"}
_STREAM = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache",
    "X-Accel-Buffering": "no",
}


class ServedPredictor:
    """A model with its name and its queue."""

    def __init__(self, predictor: Predictor, name: str, max_concurrent: int, thread: ThreadPoolExecutor) -> None:
        self.predictor = predictor
        self.name = name
        self.batcher = Batcher(predictor, QUEUE_FACTOR * max(max_concurrent, predictor.max_rows), thread)

    async def close(self) -> None:
        """No more."""
        await self.batcher.close()
        self.predictor.close()

    def metadata(self) -> dict[str, Any]:
        """As the protocol tells of a model."""
        told = self.predictor.metadata()
        body = {
            "name": self.name,
            "versions": [VERSION],
            "platform": told.platform,
            "inputs": [item.body() for item in told.inputs],
            "outputs": [item.body() for item in told.outputs],
        }
        return {**body, "parameters": dict(told.details)} if told.details else body

    async def infer(self, asked: InferRequest) -> InferenceReply:
        """Answer a request; raises InvalidInput, QueueFull, PredictionFailed."""
        rows = self.predictor.rows(asked)
        if len(rows) > MAX_ROWS:
            raise InvalidInput(f"{len(rows)} rows in one request: at most {MAX_ROWS}. Send several requests")
        results = await self.batcher.compute(rows)
        outputs = self.predictor.reply(asked, results)
        if asked.is_json:
            return json_reply(asked, self.name, VERSION, outputs)
        return reply(asked, self.name, VERSION, outputs)

    async def pieces(self, asked: InferRequest) -> AsyncGenerator[bytes, None]:
        """The events of a stream; raises InvalidInput when the model has no stream."""
        stream = getattr(self.predictor, "stream", None)
        if stream is None:
            raise InvalidInput(f"model {self.name!r} answers whole: it has no stream(inputs). Ask /infer")
        async with aclosing(stream(asked, self.batcher.on_thread)) as pieces:
            async for piece in pieces:
                yield (
                    json_reply(asked, self.name, VERSION, piece)
                    if asked.is_json
                    else reply(asked, self.name, VERSION, piece)
                ).body


class OpenInferenceRoutes:
    """`served` is set when the model is ready."""

    def __init__(self, counters: Any, why_not_ready: Callable[[], tuple[int, str]]) -> None:
        self.served: ServedPredictor | None = None
        self._counters = counters
        self._why_not_ready = why_not_ready

    def add_to(self, app: web.Application) -> None:
        """Add the routes."""
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            app.router.add_get(path, self.metadata)
            app.router.add_post(f"{path}/infer", self.infer)
            app.router.add_post(f"{path}/infer_stream", self.infer_stream)

    def _model(self, request: web.Request) -> ServedPredictor:
        if (served := self.served) is None:
            status, why = self._why_not_ready()
            raise _Refusal(status, why, _RETRY_AFTER if status == 503 else None)
        if (version := request.match_info.get("version", VERSION)) != VERSION:
            raise _Refusal(404, f"model {served.name!r} has no version {version!r}: there is {VERSION}")
        return served

    async def metadata(self, request: web.Request) -> web.StreamResponse:
        """What the model takes and gives."""
        return await self._answered(request, self._metadata)

    async def _metadata(self, request: web.Request) -> web.StreamResponse:
        return _json(self._model(request).metadata())

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        return await self._answered(request, self._infer)

    async def infer_stream(self, request: web.Request) -> web.StreamResponse:
        """Answer a request by server-sent events, each of which is a reply; `data: [DONE]` is the last."""
        return await self._answered(request, self._infer_stream)

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        served = self._model(request)
        asked = await _parsed(request)
        try:
            answer = await served.infer(asked)
        except TypeError as error:  # what the model returned is not to be told
            raise PredictionFailed(f"the model returned what cannot be sent: {error}") from error
        if answer.header_length is None:
            return web.Response(body=answer.body, content_type="application/json")
        headers = {HEADER_LENGTH: str(answer.header_length)}
        return web.Response(body=answer.body, content_type="application/octet-stream", headers=headers)

    async def _infer_stream(self, request: web.Request) -> web.StreamResponse:
        served = self._model(request)
        asked = await _parsed(request)
        if asked.binary or any(asked.wanted.values()):
            raise InvalidInput("a stream carries no binary data: leave binary_data out")
        async with aclosing(served.pieces(asked)) as pieces:
            first = await anext(pieces, None)  # an error before it has its own status
            response = web.StreamResponse(headers=_STREAM)
            await response.prepare(request)
            try:
                while first is not None:
                    await response.write(b"data: " + first + b"\n\n")
                    first = await anext(pieces, None)
                await response.write(b"data: [DONE]\n\n")
            except (ClientConnectionResetError, ConnectionResetError):
                raise
            except Exception as error:
                self._counters.num_failed += 1
                if not isinstance(error, PredictionFailed | InvalidInput | TypeError):
                    log.exception("a stream broke off")
                await response.write(b"data: " + msgspec.json.encode({"error": str(error)}) + b"\n\n")
            await response.write_eof()
            return response

    async def _answered(
        self, request: web.Request, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        counters = self._counters
        counters.num_requests += 1
        counters.num_open += 1
        try:
            return await handle(request)
        except InvalidInput as error:
            return _error(400, str(error))
        except QueueFull as error:
            counters.num_refused += 1
            return _error(429, f"the replica is full: {error}. Try again in a moment.", _RETRY_AFTER)
        except PredictionFailed as error:
            counters.num_failed += 1
            log.warning("%s", error)
            return _error(500, str(error))
        except _Refusal as error:
            return _error(error.status, str(error), error.headers)
        except (ClientConnectionResetError, ConnectionResetError, asyncio.CancelledError):
            counters.num_cancelled += 1
            raise
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        except Exception as error:
            counters.num_failed += 1
            log.exception("%s failed", request.path)
            return _error(500, f"the model failed: {type(error).__name__}: {error}")
        finally:
            counters.num_open -= 1


class _Refusal(Exception):
    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers or {}


async def _parsed(request: web.Request) -> InferRequest:
    body = await request.read()
    length = request.headers.get(HEADER_LENGTH)
    if len(body) > 1 << 16:
        return await asyncio.to_thread(parse, body, length)
    return parse(body, length)


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    encoded = msgspec.json.encode(body, enc_hook=plain)
    return web.Response(body=encoded, status=status, content_type="application/json", headers=headers)


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    return _json({"error": text}, status, headers)
