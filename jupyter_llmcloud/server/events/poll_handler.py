"""The route `/llmcloud/api/events/poll`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from jupyter_llmcloud.protocol.http.events import Polled, PollQuery
from jupyter_llmcloud.server.api.base import LLMCloudHandler
from jupyter_llmcloud.server.api.endpoints import gateway_url
from jupyter_llmcloud.server.api.keys import owner_seen
from jupyter_llmcloud.server.api.operation import operation

if TYPE_CHECKING:
    from jupyter_llmcloud.server.events.polling import PollSessions


class PollHandler(LLMCloudHandler):
    """The events without a websocket."""

    def initialize(self, polls: PollSessions, **shared: Any) -> None:  # type: ignore[override]
        """`polls` are the clients that ask so."""
        super().initialize(**shared)
        self.polls = polls

    @operation("read", Polled, query=PollQuery)
    async def get(self, query: PollQuery) -> Polled:
        """What has changed since the client asked last, where no websocket to /llmcloud/api/events can be opened.

        The first answer holds the message `hello`; what to follow is said in `messages`, as on the websocket. A
        session that has ended is answered with 404: the client begins another one, and goes on from its cursors.
        """
        said = [bytes(message) for message in query.said()]
        await self.started()
        name = query.session
        if not name:
            name = self.polls.open(gateway_url(self.request, self.base_url), await owner_seen(self))
        number, messages = await self.polls.get(name).ask(query.received, said, query.wait_s)
        self.set_header("Cache-Control", "no-store")
        return Polled(session=name, number=number, messages=[msgspec.Raw(message) for message in messages])
