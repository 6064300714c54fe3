"""How long a replica took for an answer, beside how long whoever asked has waited."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.server.gateway.open_requests import RESTARTING
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


class Place:
    """What `AskedNow` has seen."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.seen.append(name)


class AskedNow(Replica):
    """One whose connection is there, and that breaks when it is asked, if it shall."""

    def __init__(self, place: Place, breaks: bool = False) -> None:
        self._place = place
        self._breaks = breaks
        self.breaker = place

    def take_idle(self) -> AskedNow:
        return self

    def post(self, *_: Any) -> None:
        self._place.seen.append("asked")
        if self._breaks:
            raise ValueError("a line break within a header of a request")

    def close(self) -> None:
        self._place.seen.append("closed")

    def give_back(self, _: Any) -> None:
        self._place.seen.append("given back")


def asked_now(place: Place, breaks: bool = False) -> Proxy:
    """A proxy whose replica is asked already."""
    replica = AskedNow(place, breaks)

    async def enter(*_: Any) -> AskedNow:
        place.seen.append("entered")
        return replica

    admission = SimpleNamespace(enter_now=lambda _: replica, enter=enter, leave=place.leave)
    endpoint: Any = SimpleNamespace(
        name="now", state="ready", reason="", admission=admission, ready_replicas=lambda: [],
        note_outcome=lambda *_, **__: None,
    )  # fmt: skip
    sink: Any = SimpleNamespace(begin=lambda *_: None, end=lambda *_: None)
    log = logging.getLogger("test")
    proxy = Proxy(GatewayRequest("req-1", "me", "completions", b"{}"), endpoint, sink, log)
    proxy.ask_now()
    return proxy


async def test_a_replica_that_was_asked_before_the_task_began_is_asked_once() -> None:
    place = Place()
    proxy = asked_now(place)
    assert place.seen == ["asked"]
    await proxy.run()
    assert place.seen == ["asked", "given back", "leave"]
    assert proxy.record().status == 200


async def test_a_request_that_is_cut_before_its_task_began_leaves_its_place() -> None:
    """Its connection is closed, by which the replica stops, and a breaker that let it through to try lets others."""
    place = Place()
    proxy = asked_now(place)
    with pytest.raises(ApiError) as raised:
        proxy.cut(RESTARTING)
    assert raised.value.code == "server_restarting"
    assert place.seen == ["asked", "closed", "abandoned", "leave"]


async def test_what_fails_where_the_replica_is_asked_at_once_is_said_where_the_answer_is_waited_for() -> None:
    place = Place()
    proxy = asked_now(place, breaks=True)
    assert place.seen == ["asked", "closed", "abandoned", "leave"]
    with pytest.raises(ApiError) as raised:
        await proxy.run()
    assert raised.value.status == 500 and place.seen[4] == "entered" and place.seen[-1] == "leave"
