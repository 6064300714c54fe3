"""Bodies that clients have compressed, back to what they were: no larger than a limit, however small they came."""

from __future__ import annotations

import zlib

from jupyter_llmcloud.core.serving.openai_errors import ApiError

_PLAIN = ("", "identity")
_GZIP = zlib.MAX_WBITS | 16
_WBITS = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": zlib.MAX_WBITS}
MAX_MEMBERS = 64  # of a body in gzip, each of which costs a copy of what comes behind it


def check_encoding(encoding: str) -> None:
    """Raises ApiError 415 for an encoding (of the header Content-Encoding) that is not understood."""
    if encoding.strip().lower() not in (*_PLAIN, *_WBITS):
        message = f"Content-Encoding {encoding[:60]!r} is not understood: send gzip, deflate, or no such header."
        raise ApiError(415, message, code="unsupported_encoding")


def decoded(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body as it was before. Raises ApiError: 400 when it is not what the header says, 413 when it is too large."""
    encoding = encoding.strip().lower()
    if encoding in _PLAIN:
        return body
    check_encoding(encoding)
    try:
        plain, is_whole = _inflated(body, _WBITS[encoding], max_bytes)
    except zlib.error:
        if encoding != "deflate":
            raise _broken(encoding) from None
        try:  # what some send by that name has no header
            plain, is_whole = _inflated(body, -zlib.MAX_WBITS, max_bytes)
        except zlib.error:
            raise _broken(encoding) from None
    if len(plain) > max_bytes:
        raise ApiError(413, f"the body is larger than {max_bytes} bytes.", code="request_too_large")
    if not is_whole:
        raise _broken(encoding)
    return plain


def _inflated(body: bytes, wbits: int, max_bytes: int) -> tuple[bytes, bool]:
    """What is in a body, and whether its end was there. Who compresses in parts sends several members of gzip."""
    plain = b""
    for _ in range(MAX_MEMBERS):
        inflating = zlib.decompressobj(wbits)
        plain += inflating.decompress(body, max_bytes + 1 - len(plain))
        body = inflating.unused_data if wbits == _GZIP else b""
        if not (inflating.eof and body.strip(b"\0")) or len(plain) > max_bytes:  # some fill up a block with zeros
            return plain, inflating.eof
    message = f"The body in gzip has more than {MAX_MEMBERS} members: compress it as one."
    raise ApiError(400, message, code="invalid_encoding")


def _broken(encoding: str) -> ApiError:
    message = f"The body is not valid {encoding}, which the header Content-Encoding says it is."
    return ApiError(400, message, code="invalid_encoding")
