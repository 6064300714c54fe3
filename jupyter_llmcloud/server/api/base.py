"""What every handler of `/llmcloud/api` shares: who may ask, JSON in, JSON out, errors by their class, changes told."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web

from jupyter_llmcloud import errors
from jupyter_llmcloud.errors import LLMCloudError, ServerError
from jupyter_llmcloud.protocol.frames import tidy
from jupyter_llmcloud.protocol.http.base import Refusal, Response
from jupyter_llmcloud.protocol.rpc import refusal_body
from jupyter_llmcloud.server.api.cross_origin import NamedOrigins

if TYPE_CHECKING:
    from jupyter_llmcloud.server.audit import Audit

RESOURCE = "llmcloud"
MAX_BODY = 1 << 20
_MAX_DIGITS = 15
STATUS = {
    errors.UsageError: 400,
    errors.NotFound: 404,
    errors.NameTaken: 409,
    errors.CapacityError: 409,
    errors.ModelError: 422,
    errors.ConnectionLost: 503,
    errors.ProtocolError: 502,
}
Method = TypeVar("Method", bound=Callable[..., Any])


def length_of(told: str) -> int | None:
    """The Content-Length that a request tells; None: it is no number. What is far too large is only that."""
    if not (told.isascii() and told.isdigit()):
        return None
    return int(told.lstrip("0")[:_MAX_DIGITS] or "0")


def access(action: str) -> Callable[[Method], Method]:
    """The access rule of a method: signed in to Jupyter, and authorized to `action` on llmcloud.

    Both are always passed on: `authorized` would otherwise keep what it sees at its first call.
    """

    def decorate(method: Method) -> Method:
        guarded: Any = web.authenticated(authorized(action, resource=RESOURCE)(method))
        guarded.llmcloud_access = (action, RESOURCE)
        return guarded

    return decorate


class LLMCloudHandler(NamedOrigins, APIHandler):
    """Base of the JSON routes."""

    def initialize(self, audit: Audit, started: Callable[[], Awaitable[None]]) -> None:
        """What every route uses; `started` waits until the endpoints of an earlier server are known."""
        self.audit = audit
        self.started = started

    @property
    def actor(self) -> str:
        """Who asks, as the audit names them."""
        user = self.current_user
        return getattr(user, "username", None) or "unknown"

    def content(self) -> bytes:
        """The body, as far as it is not too large."""
        if len(self.request.body) > MAX_BODY:
            raise web.HTTPError(413)
        return self.request.body

    def arguments(self) -> dict[str, str]:
        """The query: of a name that comes again, the last value."""
        return {name: self.get_query_argument(name) for name in self.request.query_arguments}

    def answer(self, body: Response, status: int = 200) -> None:
        """Finish with JSON. What JSON cannot carry: NaN and infinity are null, half characters are replaced."""
        self.set_status(status)
        try:
            content = msgspec.json.encode(body)
        except UnicodeEncodeError:
            content = msgspec.json.encode(tidy(msgspec.to_builtins(body)))
        self.finish(content)

    async def carry_out(
        self,
        action: str,
        subject: str,
        work: Awaitable[Any],
        no_refusal: type[Exception] | tuple[()] = (),
        **detail: Any,
    ) -> Any:
        """Do something that changes the world, and tell the audit how it went; nothing of a `no_refusal`."""
        try:
            result = await work
        except Exception as error:
            if not isinstance(error, no_refusal):
                self.audit.tell(self.actor, action, subject, type(error).__name__, **detail)
            raise
        self.audit.tell(self.actor, action, subject, **detail)
        return result

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """`{"error": code of the class, "message"}`, with the status that belongs to the class."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        if isinstance(error, sqlite3.Error):
            error = ServerError(f"the server's database could not be read or written: {error}.")
        if isinstance(error, LLMCloudError):
            status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
            return self.answer(Refusal(**refusal_body(error)), status)
        message = getattr(error, "log_message", None) or self._reason
        self.answer(Refusal(**refusal_body(ServerError(f"{message} (HTTP {status_code})"))), status_code)
        return None

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        """An answer that is an error on purpose needs no traceback in the log."""
        if not isinstance(value, LLMCloudError):
            super().log_exception(kind, value, trace)
