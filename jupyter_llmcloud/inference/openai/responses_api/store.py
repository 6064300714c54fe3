"""The responses that can be gone on from, or read again: kept in memory by the replica that gave them, for a while."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from jupyter_llmcloud.core.serving.endpoint.response_id import unknown_response
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.protocol.openai.responses import InputItem

MAX_BYTES = 64 << 20
MAX_AGE_S = 3600.0


@dataclass(frozen=True)
class _Stored:
    owner: str
    items: bytes
    num_output: int
    response: bytes
    stored: float

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self.items) + len(self.response)


class ResponseStore:
    """The conversations behind responses, by the ids of these; the oldest go first.

    Args:
        clock: seconds, which only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_bytes: int = MAX_BYTES) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, _Stored] = OrderedDict()
        self._num_bytes = 0

    def put(
        self, response_id: str, owner: str, items: list[InputItem], output: list[InputItem], response: bytes
    ) -> None:
        """Keep a conversation and a response to it; `owner`: the key that may go on from it, and read it."""
        data = msgspec.json.encode([_plain(item) for item in [*items, *output]])
        stored = self._stored[response_id] = _Stored(owner, data, len(output), response, self._clock())
        self._num_bytes += stored.num_bytes
        self._forget_old()

    def read(self, response_id: str, owner: str) -> bytes:
        """The response itself; raises `ApiError` 404 when it is not kept, or is somebody else's."""
        self._forget_old()
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            raise unknown_response(response_id)
        return stored.response

    def input_of(self, response_id: str, owner: str) -> list[InputItem]:
        """The conversation that a response answers; raises `ApiError` 404 as `read`."""
        self.read(response_id, owner)
        stored = self._stored[response_id]
        items = msgspec.json.decode(stored.items, type=list[InputItem])
        return items[: len(items) - stored.num_output]

    def remove(self, response_id: str, owner: str) -> None:
        """Keep it no longer; raises `ApiError` 404 as `read`."""
        self.read(response_id, owner)
        self._num_bytes -= self._stored.pop(response_id).num_bytes

    def get(self, response_id: str, owner: str) -> list[InputItem]:
        """The conversation; raises `ApiError` 404 when it is not kept, or is somebody else's."""
        self._forget_old()
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            message = (
                f"previous_response_id {response_id[:128]!r} is not known here, or it is gone: a response is kept for"
                " an hour at most, in the memory of the replica that gave it, for the key that asked. Send the whole"
                " conversation as input."
            )
            raise ApiError(404, message, param="previous_response_id", code="previous_response_not_found")
        return msgspec.json.decode(stored.items, type=list[InputItem])

    def _forget_old(self) -> None:
        now = self._clock()
        while self._stored:
            response_id, oldest = next(iter(self._stored.items()))
            if self._num_bytes <= self._max_bytes and now - oldest.stored <= MAX_AGE_S:
                return
            del self._stored[response_id]
            self._num_bytes -= oldest.num_bytes


def _plain(item: InputItem) -> dict[str, object]:
    fields = msgspec.to_builtins(item)
    return {name: value for name, value in fields.items() if value is not None}
