"""A method of a route as an operation: who may carry it out, what it takes, what it answers.

All of it is said once, beside the method, and is what the method goes by and what the OpenAPI document tells.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jupyter_server.auth.decorator import allow_unauthenticated

from jupyter_llmcloud.protocol.http.base import Body, Query, Response
from jupyter_llmcloud.protocol.http.decoding import decode_body, decode_query
from jupyter_llmcloud.server.api.base import LLMCloudHandler, access

if TYPE_CHECKING:
    Method = Callable[..., Awaitable[Response | None]]
    Handled = Callable[..., Awaitable[None]]

EVERYBODY = ""  # in place of an action: whoever comes, without signing in


class NoFields(Body, frozen=True):
    """Nothing needs to be said."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What a method of a route takes and gives.

    Attributes:
        summary: one sentence.
        description: more of it.
        action: for which one must be authorized on llmcloud; EVERYBODY for none.
        replies: what it answers by HTTP status: a struct, or the media type of what it writes itself.
        body: of the request: a struct, or the media type of what the method reads itself; None where it has none.
        query: what may be said behind the path.
    """

    summary: str
    description: str
    action: str
    replies: Mapping[int, type[Response] | str]
    body: type[Body] | str | None = None
    query: type[Query] | None = None

    def asked(self, handler: LLMCloudHandler) -> dict[str, Any]:
        """The body and the query of a request, as the method takes them. Raises UsageError."""
        found: dict[str, Any] = {}
        if isinstance(self.body, type):
            found["body"] = decode_body(self.body, handler.content())
        if self.query is not None:
            found["query"] = decode_query(self.query, handler.arguments())
        return found

    def status_of(self, reply: Response) -> int:
        """The status under which such a reply is answered."""
        return next(status for status, kind in self.replies.items() if kind is type(reply))


def operation(
    action: str,
    reply: type[Response] | str,
    status: int = 200,
    *,
    body: type[Body] | None = None,
    query: type[Query] | None = None,
    others: Mapping[int, type[Response]] | None = None,
) -> Callable[[Method], Handled]:
    """Make a method an operation: it is handed `body` and `query` by these names, and returns its reply.

    Args:
        action: read, write or execute, on llmcloud; or EVERYBODY.
        reply: the struct, or the media type, that is answered with `status`.
        others: what else may be answered, by its status.
    """

    def decorate(method: Method) -> Handled:
        summary, _, description = inspect.cleandoc(method.__doc__ or "").partition("\n")
        told = Operation(
            summary=summary,
            description=" ".join(description.split()),
            action=action,
            replies={status: reply, **(others or {})},
            body=body,
            query=query,
        )

        @functools.wraps(method)
        async def carried_out(self: LLMCloudHandler, *path: str) -> None:
            answer = await method(self, *path, **told.asked(self))
            if answer is not None:
                self.answer(answer, told.status_of(answer))

        guarded: Any = access(action)(carried_out) if action else allow_unauthenticated(carried_out)
        guarded.llmcloud_operation = told
        return guarded

    return decorate
