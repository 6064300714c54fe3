"""A request passed on to a server of others: the model's name there, its tokens counted, its errors as ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
from aiohttp import ClientConnectionResetError, hdrs, web

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.external.server import ExternalServer
from jupyter_llmcloud.inference.openai.responses import TokenUsage
from jupyter_llmcloud.inference.usages import behind_the_last_event

log = logging.getLogger(__name__)

QUEUE_FACTOR = 4
_RETRY_AFTER_S = 1.0
_MAX_EVENT = 1 << 20
_STREAM = {
    hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
    hdrs.CACHE_CONTROL: "no-cache",
    "X-Accel-Buffering": "no",
}
_LOST = (aiohttp.ClientError, OSError, TimeoutError)
Count = Callable[[TokenUsage], None]


class Forward:
    """Passes requests on. `status` counts them, as those that engines of our own answer."""

    def __init__(self, server: ExternalServer, served_name: str, status: Any, max_open: int) -> None:
        self.server = server
        self._name = served_name
        self._status = status
        self._max_open = max_open

    async def answer(self, request: web.Request, count: Count) -> web.StreamResponse:
        """The answer of the server to a POST below /v1; `count` is told what it has cost. Raises ApiError."""
        status = self._status
        if status.num_open >= self._max_open:
            status.num_refused += 1
            message = f"The replica is full ({status.num_open} requests). Try again in a moment."
            raise ApiError(429, message, code="overloaded", retry_after_s=_RETRY_AFTER_S)
        status.num_requests += 1
        status.num_open += 1
        try:
            return await self._pass_on(request, count)
        except _LOST as error:
            status.num_failed += 1
            raise self._lost(error) from None
        except asyncio.CancelledError:
            status.num_cancelled += 1
            raise
        finally:
            status.num_open -= 1

    async def _pass_on(self, request: web.Request, count: Count) -> web.StreamResponse:
        body = _decoded(await request.read())
        tells_usage = self._prepare(request.path, body)
        url = f"{self.server.base_url}{request.path.removeprefix('/v1')}"
        headers = {hdrs.CONTENT_TYPE: "application/json"}
        data = msgspec.json.encode(body)
        async with self.server.session.post(url, data=data, headers=headers) as response:
            if response.status != 200:
                raise await self._refusal(response)
            if response.content_type != "text/event-stream":
                answer = await response.read()
                return self._whole(answer, count, response.content_type)
            return await self._stream(request, response, count, tells_usage)

    def _prepare(self, path: str, body: dict[str, Any]) -> bool:
        """Name the model as it is named there, and ask for the tokens of a stream; whether the client wants them."""
        self._check_name(body.get("model", self._name))
        body["model"] = self.server.model
        if not body.get("stream") or not path.endswith("completions"):
            return True
        options = body.get("stream_options")
        options = options if isinstance(options, dict) else {}
        body["stream_options"] = {**options, "include_usage": True}
        return options.get("include_usage") is True

    def _check_name(self, name: Any) -> None:
        """Raise ApiError for another model: an adapter, for one, which only engines of our own load."""
        if name != self._name:
            message = (
                f"The model {str(name)[:128]!r} does not exist here: this endpoint serves {self._name!r} by "
                f"{self.server.engine}, and loads no adapters beside it."
            )
            raise ApiError(404, message, param="model", code="model_not_found")

    def _whole(self, answer: bytes, count: Count, content_type: str) -> web.Response:
        told = _object(answer)
        if told is not None:
            self._note(told, count)
            if "model" in told and told["model"] != self._name:
                answer = msgspec.json.encode({**told, "model": self._name})
        return web.Response(body=answer, content_type=content_type)

    async def _stream(
        self, request: web.Request, response: aiohttp.ClientResponse, count: Count, tells_usage: bool
    ) -> web.StreamResponse:
        out = web.StreamResponse(headers=_STREAM)
        await out.prepare(request)
        ended = False
        told: TokenUsage | None = None
        num_pieces = 0

        def note(usage: TokenUsage) -> None:
            nonlocal told
            told = usage
            count(usage)

        try:
            async for event in events_of(response):
                ended = ended or event.strip() == b"data: [DONE]"
                # A server that tells no usage sends a token at a time, as a rule: better than nothing at all.
                num_pieces += b'"choices"' in event
                if (sent := self._event(event, note, tells_usage)) is not None:
                    await out.write(sent)
            if not ended and request.path.endswith("completions"):
                raise aiohttp.ClientPayloadError("it ended its answer before that was complete")
        except (ClientConnectionResetError, ConnectionResetError) as error:
            if request.transport is None or request.transport.is_closing():  # the client has hung up
                self._status.num_cancelled += 1
                return out
            await self._break_off(out, error)
        except _LOST as error:
            await self._break_off(out, error)
        finally:
            if told is None:
                count(TokenUsage(0, num_pieces))
        await out.write_eof(behind_the_last_event(request, told or TokenUsage(0, num_pieces)))
        return out

    async def _break_off(self, out: web.StreamResponse, error: Exception) -> None:
        self._status.num_failed += 1
        await out.write(b"data: " + msgspec.json.encode(self._lost(error).body()) + b"\n\n")

    def _event(self, event: bytes, count: Count, tells_usage: bool) -> bytes | None:
        """An event as the client gets it; None for one that it did not ask for."""
        if not (self.server.is_elsewhere or b'"usage"' in event):
            return event
        head, _, data = event.partition(b"data:")
        told = _object(data.strip())
        if head.strip() or told is None:
            return event
        self._note(told, count)
        if not tells_usage and told.get("choices") == [] and told.get("usage"):
            return None
        if self.server.is_elsewhere and "model" in told:
            return b"data: " + msgspec.json.encode({**told, "model": self._name}) + b"\n\n"
        return event

    def _note(self, told: dict[str, Any], count: Count) -> None:
        usage = told.get("usage")
        if not isinstance(usage, dict):
            return
        prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
        generated = usage.get("completion_tokens", usage.get("output_tokens", 0))
        if isinstance(prompt, int) and isinstance(generated, int):
            count(TokenUsage(prompt, generated))

    async def _refusal(self, response: aiohttp.ClientResponse) -> ApiError:
        """Its error as one of ours. That it knows not our key is nothing that the client can mend."""
        told = _object(await response.read()) or {}
        error = told.get("error", told)
        row = error if isinstance(error, dict) else {"message": error}
        message = row.get("message") or row.get("detail") or f"it answered with status {response.status}"
        text = message if isinstance(message, str) else msgspec.json.encode(message).decode()
        if response.status in (400, 404, 413, 422):
            status = 400 if response.status in (404, 422) else response.status
            param = row.get("param") if isinstance(row.get("param"), str) else None
            code = row.get("code") if isinstance(row.get("code"), str) else None
            return ApiError(status, text, param=param, code=code)
        if response.status == 429:
            self._status.num_refused += 1
            return ApiError(429, text, code="overloaded", retry_after_s=_seconds(response.headers.get("Retry-After")))
        self._status.num_failed += 1
        log.warning("%s answered %s: %s", self.server.base_url, response.status, text)
        why = "refuses the key of this endpoint" if response.status in (401, 403) else f"failed: {text}"
        return ApiError(503, f"The engine of this model {why}.", code="engine_failed", retry_after_s=_RETRY_AFTER_S)

    def _lost(self, error: Exception) -> ApiError:
        why = self.server.failure or str(error) or type(error).__name__
        return ApiError(503, f"The engine of this model was lost: {why}.", code="engine_failed")


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The events of a stream, each with the empty line that ends it."""
    waiting = b""
    async for chunk in response.content.iter_any():
        # As a whole: the two bytes that end a line may come apart.
        waiting = (waiting + chunk).replace(b"\r\n", b"\n")
        *events, waiting = waiting.split(b"\n\n")
        for event in events:
            if event:
                yield event + b"\n\n"
        if len(waiting) > _MAX_EVENT:
            raise aiohttp.ClientPayloadError("an event of its stream has no end")
    if waiting.strip():
        yield waiting + b"\n\n"


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        read = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(read, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(read).__name__}.", code="invalid_json")
    return read


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        read = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text)) if text else _RETRY_AFTER_S
    except ValueError:
        return _RETRY_AFTER_S
