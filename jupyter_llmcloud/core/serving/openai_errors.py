"""The error body that OpenAI clients understand: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    503: "service_unavailable_error",
}


def error_type(status: int) -> str:
    """The `type` that goes with an HTTP status."""
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


class ApiError(Exception):
    """An answer other than 200 of the OpenAI surface.

    Attributes:
        status: the HTTP status.
        message: what happened, the value seen, what to do.
        param: the request parameter at fault, when there is one.
        code: a short machine-readable reason, such as `context_length_exceeded`.
        retry_after_s: when to try again, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON body, also used for an error inside a stream."""
        return {
            "error": {
                "message": self.message,
                "type": error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """`Retry-After` in seconds and `retry-after-ms`, which OpenAI's clients prefer; never a moment too early."""
        if self.retry_after_s is None:
            return {}
        whole = max(1, math.ceil(self.retry_after_s))
        return {"Retry-After": str(whole), "retry-after-ms": str(math.ceil(self.retry_after_s * 1000))}
