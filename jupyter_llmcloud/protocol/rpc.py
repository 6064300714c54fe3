"""Requests and replies between our processes: how they are matched, and how an exception crosses.

Every request names the type of its reply. One end asks by `Calls`, the other answers by a `Responder`; what lies
between them only has to carry messages: a socket, a link over sockets that may break, one message inside another. What
a handler raises is a refusal on the wire, and the same class of `errors` at the end that asked (`refusal`, `restored`).
What nobody foresaw is logged where it happened, with its traceback, and is an InternalError at the other end.
"""

from __future__ import annotations

import asyncio
import logging
import types
import typing
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Generic, TypeVar

from msgspec import field

from jupyter_llmcloud.errors import ConnectionLost, InternalError, LLMCloudError, ProtocolError, ServerError
from jupyter_llmcloud.protocol.frames import Message, Unreadable, replace

log = logging.getLogger("jupyter_llmcloud.rpc")


class Reply(Message, frozen=True, kw_only=True):
    """Base of what answers a request; `reply_to` is that request's number."""

    is_abstract: ClassVar[bool] = True
    reply_to: int = 0

    def as_dict(self) -> dict[str, Any]:
        """What it says, by the names of its fields."""
        names = self.__struct_fields__
        return {name: getattr(self, name) for name in names if name not in ("payload", "reply_to")}


class Done(Reply, frozen=True, kw_only=True):
    """The request was carried out, and there is nothing to say about it."""


class Refused(Reply, frozen=True, kw_only=True):
    """The request was not carried out, for this error. To the number 0: nothing more comes over this connection."""

    code: str
    message: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


R = TypeVar("R", bound=Reply)


class Request(Message, Generic[R], frozen=True, kw_only=True):
    """Base of what is asked; `number` is the asking end's own, and 0 where nobody waits for the reply.

    Attributes:
        replies: the types that may answer it, besides a refusal: those in the brackets of `Request[...]`.
    """

    is_abstract: ClassVar[bool] = True
    replies: ClassVar[tuple[type[Reply], ...]] = ()
    number: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        (wanted,) = typing.get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]
        cls.replies = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)


# --- an exception as a refusal, and back ----------------------------------------------------------------------------


def refusal(error: BaseException, who: str = "", request: str = "") -> Refused:
    """The refusal that `error` is at the other end. What is not an error of ours is logged here, with its traceback.

    Args:
        who: the process that answers, such as "the node agent".
        request: what it was asked for.
    """
    if isinstance(error, LLMCloudError):
        return Refused(code=error.code, message=str(error), detail=error.detail)
    log.error("%s failed on %s", who, request, exc_info=error)
    reason = f"{who} failed on {request}: {type(error).__name__}: {error}. Its log has the traceback."
    return Refused(code=InternalError.code, message=reason)


def restored(refused: Refused, default: type[LLMCloudError] = LLMCloudError) -> LLMCloudError:
    """The error that was refused with, of its own class; of `default` when this process does not know the class."""
    kind = LLMCloudError.by_code.get(refused.code, default)
    try:
        return kind.restored(refused.message, refused.detail)
    except TypeError:  # its detail is another version's
        return default(refused.message)


def refusal_body(error: BaseException) -> dict[str, Any]:
    """An error of ours as the REST API says it: {"error": code, "message"}, and "detail" where it carries some."""
    refused = refusal(error)
    body = {"error": refused.code, "message": refused.message}
    return {**body, "detail": refused.detail} if refused.detail else body


def restored_body(body: Any, otherwise: str) -> LLMCloudError:
    """The error that a body of the REST API says; a ServerError with `otherwise` when it says none of ours."""
    told = body if isinstance(body, dict) else {}
    detail = told.get("detail")
    return restored(
        Refused(
            code=str(told.get("error")),
            message=str(told.get("message") or otherwise),
            detail=detail if isinstance(detail, dict) else {},
        ),
        default=ServerError,
    )


def not_answered(who: str, request: Message) -> ProtocolError:
    """What is said of a request that `who` has no handler for."""
    if isinstance(request, Unreadable):
        return ProtocolError(f"{who} was asked {request.kind!r}, which {request.reason}.")
    return ProtocolError(f"{who} does not answer {type(request).__name__}.")


def result(request: Request[R], reply: Message, peer: str) -> R:
    """The reply to a request; raises what it was refused with, ProtocolError when it is no reply to that."""
    if isinstance(reply, request.replies):
        return typing.cast(R, reply)
    asked = type(request).__name__
    if isinstance(reply, Refused):
        raise restored(reply)
    if isinstance(reply, Unreadable):
        raise ProtocolError(f"{peer} answered {asked} with {reply.kind!r}, which {reply.reason}.")
    wanted = " or ".join(kind.__name__ for kind in request.replies)
    raise ProtocolError(f"{peer} answered {asked} with {type(reply).__name__}: expected {wanted}.")


def check_reply(reply: Reply | Unreadable, num_asked: int, peer: str) -> None:
    """Raise what a refusal of the whole connection says, ProtocolError for a reply to what nobody has asked."""
    if isinstance(reply, Refused) and not reply.reply_to:
        raise restored(reply)
    if not 0 < reply.reply_to <= num_asked:
        kind = reply.kind if isinstance(reply, Unreadable) else type(reply).__name__
        raise ProtocolError(f"{peer} sent {kind} as the reply to request {reply.reply_to}, which was not made.")


# --- the end that asks ----------------------------------------------------------------------------------------------


class Calls:
    """The requests of one end that wait for their replies, in asyncio.

    Args:
        peer: who answers, for messages such as "{peer} did not answer in 30 s.".
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._last = 0
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._failed: Refused | None = None

    async def ask(self, request: Request[R], send: Callable[[Message], None], timeout_s: float | None = None) -> R:
        """Send a request with a number of its own, and wait for its reply; raises what it is refused with."""
        if self._failed is not None:
            raise restored(self._failed)
        number = self._last = self._last + 1
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        try:
            send(replace(request, number=number))
            async with asyncio.timeout(timeout_s):
                return result(request, await reply, self.peer)
        except TimeoutError:
            raise ConnectionLost(f"{self.peer} did not answer in {timeout_s:g} s.") from None
        finally:
            del self._waiting[number]

    def take(self, reply: Reply | Unreadable) -> None:
        """A reply has come. Raises what a refusal of the whole connection says, ProtocolError for what nobody asked."""
        if (waiting := self._waiting.get(reply.reply_to)) is not None:
            if not waiting.done():
                waiting.set_result(reply)
        else:  # too late, for somebody who waits no more, or to nothing
            check_reply(reply, self._last, self.peer)

    def fail(self, error: LLMCloudError) -> None:
        """No reply comes any more: `error` is raised for whoever waits, and whoever asks from now on."""
        self._failed = refusal(error)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(self._failed)


# --- the end that answers -------------------------------------------------------------------------------------------

Handler = Callable[..., Any]


class Responder:
    """Answers requests by a handler for each of their types.

    A handler takes the request and what was given to `answer` besides, and returns a reply, or awaits one. None is
    `Done` where that is the reply, and elsewhere says that the answer comes by other messages.

    Args:
        who: this process, such as "the node agent".
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self._handlers: dict[type[Message], Handler] = {}

    def on(self, kind: type[Request[R]], handler: Callable[..., Awaitable[R | None] | R | None]) -> None:
        """Have requests of this type answered by `handler`."""
        self._handlers[kind] = handler

    async def answer(self, request: Request[Any] | Unreadable, *given: Any) -> Reply | None:
        """The reply to a request, with its number; None when there is none to be sent, or nobody waits for it."""
        try:
            answer = self._handler(request)(request, *given)
            if hasattr(answer, "__await__"):
                answer = await answer
            reply = self._checked(request, answer)
        except Exception as error:
            reply = refusal(error, self.who, type(request).__name__)
        return replace(reply, reply_to=request.number) if reply is not None and request.number else None

    async def serve(self, request: Request[Any] | Unreadable, send: Callable[[Message], None], *given: Any) -> None:
        """Answer a request by `send`; a reply that no message can carry is a failure, which is answered."""
        reply = await self.answer(request, *given)
        if reply is None:
            return
        try:
            send(reply)
        except (ValueError, TypeError) as error:
            send(replace(refusal(error, self.who, type(request).__name__), reply_to=request.number))

    def _handler(self, request: Request[Any] | Unreadable) -> Handler:
        handler = self._handlers.get(type(request))
        if handler is None:
            raise not_answered(self.who, request)
        return handler

    @staticmethod
    def _checked(request: Request[Any] | Unreadable, answer: Any) -> Reply | None:
        assert isinstance(request, Request)
        if answer is None:
            return Done() if Done in request.replies else None
        if not isinstance(answer, (*request.replies, Refused)):
            raise TypeError(f"the handler of {type(request).__name__} returned a {type(answer).__name__}")
        return typing.cast(Reply, answer)
