"""What this server answers itself of the OpenAI surface: typed as the API is, refused in OpenAI's words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from jupyter_llmcloud.core.serving.content_encoding import decoded
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.protocol.http.base import Body, Query, Response
from jupyter_llmcloud.protocol.http.decoding import WrongField, decode_body, decode_query
from jupyter_llmcloud.server.api.operation import Operation
from jupyter_llmcloud.server.gateway.auth import GatewayHandler, gateway_access

Method = Callable[..., Awaitable[Response | None]]
MAX_BODY = 1 << 20


def gateway_operation(
    action: str,
    reply: type[Response] | str,
    *,
    body: type[Body] | str | None = None,
    query: type[Query] | None = None,
) -> Callable[[Method], Callable[..., Awaitable[None]]]:
    """Make a method an operation of `/llmcloud/v1`: it is handed `body` and `query`, and returns its reply.

    Args:
        action: read or execute, on llmcloud, for who comes without a scoped key.
        reply: the struct, or the media type, that is answered with 200.
        body: of the request: a struct, or the media type of what the method reads itself.
    """

    def decorate(method: Method) -> Callable[..., Awaitable[None]]:
        summary, _, description = inspect.cleandoc(method.__doc__ or "").partition("\n")
        told = Operation(
            summary=summary,
            description=" ".join(description.split()),
            action=action,
            replies={200: reply},
            body=body,
            query=query,
        )

        @functools.wraps(method)
        async def carried_out(self: GatewayHandler, *path: str) -> None:
            await self.started()
            try:
                answer = await method(self, *path, **_asked(told, self))
            except NotFound as error:
                raise ApiError(404, str(error), code="not_found") from None
            except WrongField as error:
                raise ApiError(400, str(error), param=error.field or None, code="invalid_value") from None
            except UsageError as error:
                raise ApiError(400, str(error), code="invalid_value") from None
            except LLMCloudError as error:
                raise ApiError(503, str(error)) from None
            if answer is not None:
                self.finish(msgspec.json.encode(answer))

        guarded: Any = gateway_access(action)(carried_out)
        guarded.llmcloud_operation = told
        return guarded

    return decorate


def _asked(told: Operation, handler: GatewayHandler) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(told.body, type):
        if len(handler.request.body) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY} bytes.", code="request_too_large")
        encoding = handler.request.headers.get("Content-Encoding", "")
        found["body"] = decode_body(told.body, decoded(handler.request.body, encoding, MAX_BODY))
    if told.query is not None:
        arguments = {name: handler.get_query_argument(name) for name in handler.request.query_arguments}
        found["query"] = decode_query(told.query, arguments)
    return found
