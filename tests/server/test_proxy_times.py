"""How long a replica took for an answer, beside how long whoever asked has waited."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import SimpleNamespace
from typing import Any

from jupyter_llmcloud.server.gateway.proxy import GatewayRequest, Proxy

QUEUED_S = 0.3


class Answer:
    """What a replica answers at once."""

    status, content_type, headers = 200, "application/json", {"content-type": "application/json"}

    async def read(self) -> bytes:
        return b"{}"


class Replica:
    """One that is free."""

    id, stored = "r-1", SimpleNamespace(revision=1)

    @property
    def connections(self) -> Replica:
        return self

    def use(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def take(self) -> Replica:
        return self

    def post(self, *_: Any) -> None:
        pass

    async def answer(self) -> Answer:
        return Answer()

    def give_back(self, _: Any) -> None:
        pass


class Queued:
    """The admission of an endpoint at which others are before."""

    async def enter(self, *_: Any) -> Replica:
        await asyncio.sleep(QUEUED_S)
        return Replica()

    def leave(self, *_: Any) -> None:
        pass


async def test_the_wait_for_a_place_is_no_part_of_what_a_replica_took() -> None:
    """A shadow, which has no queue before it, was told to be faster than the revision that answers."""
    noted: list[float] = []
    endpoint: Any = SimpleNamespace(
        name="queued",
        admission=Queued(),
        ready_replicas=lambda: [],
        note_outcome=lambda replica, failed, tokens, seconds: noted.append(seconds),
    )
    sink: Any = SimpleNamespace(begin=lambda *_: None, end=lambda *_: None)
    proxy = Proxy(GatewayRequest("req-1", "me", "completions", b"{}"), endpoint, sink, logging.getLogger("test"))
    await proxy.run()
    assert proxy.record().duration_s >= QUEUED_S
    assert proxy.record().duration_s - proxy.answer_s >= QUEUED_S * 0.9
    assert noted == [proxy.answer_s]
