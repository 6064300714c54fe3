"""What a stream has cost, told behind its last event: from a replica to the gateway, which keeps it to itself.

A client that did not ask for the usage of its stream must not get to see any, and the gateway must know it all the
same. So the gateway asks for it by a header, and the replica ends its stream with a comment of server-sent events (HTML
standard, 9.2.5), which the gateway cuts off:

    : usage {"prompt_tokens":3,"completion_tokens":5}
"""

from __future__ import annotations

import json

STREAM_USAGE_HEADER = "X-LLMC-Stream-Usage"
BEHIND_THE_LAST_EVENT = "comment"  # the one value of that header
MARK = b": usage "
_BOUNDARY = b"\n\n"


def usage_comment(prompt_tokens: int, completion_tokens: int) -> bytes:
    """The comment that ends a stream."""
    told = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return MARK + json.dumps(told, separators=(",", ":")).encode() + _BOUNDARY


class UsageCut:
    """Takes the comment off a stream that comes in pieces, wherever these are cut.

    Attributes:
        comment: its bytes, as far as they have come.
    """

    def __init__(self) -> None:
        self.comment = b""
        self._at_boundary = True
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What of a piece, and of what was held back before, belongs to the client."""
        if self.comment:
            self.comment += chunk
            return b""
        if self._held:
            chunk, self._held = self._held + chunk, b""
        if (at := self._begins_at(chunk)) >= 0:
            self.comment = chunk[at:]
            return chunk[:at]
        if not chunk.endswith(_BOUNDARY):
            chunk = self._hold_back(chunk)
        if chunk:
            self._at_boundary = chunk.endswith(_BOUNDARY)
        return chunk

    def _begins_at(self, chunk: bytes) -> int:
        if self._at_boundary and chunk.startswith(MARK):
            return 0
        found = chunk.find(_BOUNDARY + MARK)
        return found + len(_BOUNDARY) if found >= 0 else -1

    def _hold_back(self, chunk: bytes) -> bytes:
        """Keep what may be the beginning of the comment until more of it has come."""
        found = chunk.rfind(_BOUNDARY)
        begins = found + len(_BOUNDARY) if found >= 0 else 0 if self._at_boundary else len(chunk)
        if not MARK.startswith(chunk[begins:]):
            begins = len(chunk)
        if begins == len(chunk) and chunk.endswith(b"\n"):  # half of a boundary
            begins -= 1
        self._held = chunk[begins:]
        return chunk[:begins]

    def rest(self) -> bytes:
        """The stream has ended: what was held back, and was no comment after all."""
        held, self._held = self._held, b""
        return held

    def usage(self) -> tuple[int, int] | None:
        """Prompt and completion tokens, when the comment has come whole."""
        if not self.comment.endswith(_BOUNDARY):
            return None
        try:
            told = json.loads(self.comment[len(MARK) :])
            return int(told["prompt_tokens"]), int(told["completion_tokens"])
        except (ValueError, KeyError, TypeError):
            return None
