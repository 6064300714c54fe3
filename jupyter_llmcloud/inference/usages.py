"""What the latest requests have cost, by their ids: a stream that does not tell, or that was cut, is counted too."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from jupyter_llmcloud.core.serving.usage.stream_usage import (
    BEHIND_THE_LAST_EVENT,
    STREAM_USAGE_HEADER,
    usage_comment,
)
from jupyter_llmcloud.inference.openai.responses import TokenUsage

MAX_KEPT = 4096


def behind_the_last_event(request: web.Request, usage: TokenUsage) -> bytes:
    """The end of a stream: what it has cost, for whoever asked for that by a header."""
    is_wanted = request.headers.get(STREAM_USAGE_HEADER) == BEHIND_THE_LAST_EVENT
    return usage_comment(usage.num_prompt, usage.num_generated) if is_wanted else b""


class Usages:
    """The tokens of the requests that are answered, and of the latest that were."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Event] = {}
        self._ended: OrderedDict[str, TokenUsage] = OrderedDict()

    @contextmanager
    def counting(self, request_id: str) -> Iterator[Callable[[TokenUsage], None]]:
        """A request is answered inside; call what is given with what it has cost."""
        over = self._open[request_id] = asyncio.Event()

        def keep(usage: TokenUsage) -> None:
            self._ended[request_id] = usage
            while len(self._ended) > MAX_KEPT:
                self._ended.popitem(last=False)

        try:
            yield keep
        finally:
            self._open.pop(request_id, None)
            over.set()

    async def of(self, request_id: str, timeout_s: float) -> TokenUsage | None:
        """What a request has cost; waits until it has ended. None when it is unknown, or does not end."""
        if (over := self._open.get(request_id)) is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    await over.wait()
            except TimeoutError:
                return None
        return self._ended.get(request_id)
