"""`GET /llmcloud/api/events/poll`: the events for clients that no websocket reaches, asked for again and again.

The messages are those of the websocket (see `events`). A client that has lost an answer on the way asks again with the
number of the one that it has: what came after it is told once more.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.http.base import Query, Response

MAX_WAIT_S = 20.0

# Encoded once, for all clients.
Told = Annotated[msgspec.Raw, Meta(extra_json_schema={"$ref": "#/components/schemas/ServerMessage"})]


class PollQuery(Query, frozen=True):
    """What a client says, and how long it waits for something to be told."""

    session: Annotated[str, Meta(description="As answered before; empty to begin.")] = ""
    received: Annotated[
        int, Meta(ge=0, description="`number` of the newest answer that has arrived; 0 before the first.")
    ] = 0
    messages: Annotated[str, Meta(description="What the client says: a JSON list of ClientMessage.")] = ""
    wait_s: Annotated[
        float, Meta(ge=0, le=MAX_WAIT_S, description="The answer may take so long while there is nothing to tell.")
    ] = 10.0

    def said(self) -> list[msgspec.Raw]:
        """Each of the messages as JSON. Raises UsageError."""
        try:
            return _decode(self.messages or "[]")
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise UsageError(f"messages={self.messages!r:.80} is no JSON list: {error}.") from None


class Polled(Response, frozen=True):
    """What the client is told.

    Attributes:
        session: names the connection; it ends when it is not asked for half a minute.
        number: of this answer.
        messages: what there is to tell, in order; empty when nothing happened.
    """

    session: str
    number: int
    messages: list[Told]


_decode = msgspec.json.Decoder(list[msgspec.Raw]).decode
