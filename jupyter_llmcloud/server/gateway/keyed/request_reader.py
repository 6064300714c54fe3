"""The bytes of a connection as requests with a key, one after the other, as long as nothing in them needs judging."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from jupyter_llmcloud.server.gateway.keyed.plain_head import plain_head

if TYPE_CHECKING:
    from jupyter_llmcloud.server.gateway.keyed.answer import Admitted, Asked

_HEAD_END = b"\r\n\r\n"
MAX_DIGITS = 15
_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]{1,%d})(?=\r\n)" % MAX_DIGITS, re.IGNORECASE)


class Judge(Protocol):
    """Whoever tells plain requests with a key from all others."""

    def admit(self, uri: str, headers: Mapping[str, str], address: str) -> Admitted | None:
        """The request that is posted with these headers; None: it is for a handler."""

    def admits_again(self, asked: Asked, length: int) -> bool:
        """Whether there may be another one with the same head, but for its length; if not, it is read as a new one."""


class _LastHead(NamedTuple):
    """A head that was let in; the key in it is not kept."""

    digest: bytes
    length_at: int
    asked: Asked


class RequestReader:
    """What has come on a connection.

    Args:
        judge: tells what may be answered.
        address: of who sends it.
        begun: what has come already.

    Attributes:
        asked: the request whose head has come, when it is one that may be answered.
    """

    def __init__(self, judge: Judge, address: str, begun: bytes) -> None:
        self.asked: Asked | None = None
        self._judge = judge
        self._address = address
        self._unread = bytearray(begun)
        self._body_at = 0
        self._body_ends = 0
        self._last: _LastHead | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """More of it."""
        self._unread += data

    @property
    def num_unread(self) -> int:
        """Bytes that belong to no request that was taken."""
        return len(self._unread)

    def rest(self) -> bytes:
        """These bytes."""
        return bytes(self._unread)

    def read_head(self) -> bool:
        """Whether there is the head of a request that may be answered."""
        ends = self._unread.find(_HEAD_END)
        if ends >= 0:
            head = bytes(memoryview(self._unread)[: ends + 2])
            self._body_at = ends + len(_HEAD_END)
            if not self._is_same(head):
                self._new_head(head)
        return self.asked is not None

    def _is_same(self, head: bytes) -> bool:
        """Clients send the same head again and again, but for the length of the body."""
        if self._last is None:
            return False
        digest, at, asked = self._last
        ends = head.find(b"\r\n", at)
        told = head[at:ends]
        if not told.isdigit() or len(told) > MAX_DIGITS or _digest(head[:at], head[ends:]) != digest:
            return False
        length = int(told)
        if not self._judge.admits_again(asked, length):
            return False
        self.asked, self._body_ends = asked, self._body_at + length
        return True

    def _new_head(self, head: bytes) -> None:
        self._last = None
        read = plain_head(head)
        admitted = self._judge.admit(read.uri, read.headers, self._address) if read is not None else None
        if admitted is None:
            return
        self.asked, self._body_ends = admitted.asked, self._body_at + admitted.length
        if (told := _LENGTH.search(head)) is not None:
            at, ends = told.span(1)
            self._last = _LastHead(_digest(head[:at], head[ends:]), at, self.asked.without("authorization"))

    def body(self) -> bytes | None:
        """The body of the request, once it has come."""
        ends = self._body_ends
        return bytes(memoryview(self._unread)[self._body_at : ends]) if len(self._unread) >= ends else None

    def take(self) -> None:
        """The request is being answered."""
        del self._unread[: self._body_ends]
        self.asked = None


def _digest(before: bytes, behind: bytes) -> bytes:
    return hashlib.blake2b(before + behind, digest_size=32).digest()
