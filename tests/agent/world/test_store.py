"""The process that holds the store by which ranks meet, by values: what forks it is a stand-in."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.agent.world.store import Store
from jupyter_llmcloud.errors import WorldError

DEADLINE_S = 10
no_ipv6 = pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="a host without IPv6")


class StandInZygote:
    """Forks nothing: keeps the child's end of the control socket, as a child does, and hands it to `child`."""

    def __init__(self, child: Callable[[socket.socket, int], None]) -> None:
        self._child = child

    async def fork(self, request: Any, fds: list[int]) -> int:
        self._child(socket.socket(fileno=os.dup(fds[0])), fds[2])
        return 1


def dies(control: socket.socket, log: int) -> None:
    os.write(log, b"no module named torch")
    control.close()


def answers(control: socket.socket, log: int) -> None:
    control.sendall(b"+")
    children.append(control)


def is_slow(control: socket.socket, log: int) -> None:
    children.append(control)


children: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Any:
    yield
    for control in children:
        control.close()
    children.clear()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "store.log"


async def start(log: Path, child: Callable[[socket.socket, int], None], interface: str = "127.0.0.1") -> Store:
    store = Store("w/store1", log)
    await asyncio.wait_for(store.start(StandInZygote(child), interface), DEADLINE_S)  # type: ignore[arg-type]
    return store


@pytest.mark.parametrize("interface", ["127.0.0.1", pytest.param("::1", marks=no_ipv6)])
def test_a_store_that_answers_has_an_address(log: Path, interface: str) -> None:
    store = asyncio.run(start(log, answers, interface))
    host, _, port = store.address.rpartition(":")
    assert host == interface and int(port)
    store.close()


def test_a_store_that_ends_at_its_start_is_told_at_once_with_its_last_words(log: Path) -> None:
    with pytest.raises(WorldError, match=r"ended at its start(.|\n)*no module named torch"):
        asyncio.run(start(log, dies))


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_the_next_store_starts_after_one_that_was_given_up_while_it_started(log: Path, how: str) -> None:
    """It gets the same number for its socket, which the loop must have forgotten."""

    async def both() -> str:
        given_up = Store("w/store1", log)
        starting = asyncio.ensure_future(given_up.start(StandInZygote(is_slow), "127.0.0.1"))  # type: ignore[arg-type]
        while not children:
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # it waits for the answer now
        if how == "cancelled":
            starting.cancel()
        given_up.close()
        following = await start(log, answers)
        following.close()
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else WorldError):
            await asyncio.wait_for(starting, DEADLINE_S)
        return following.address

    assert asyncio.run(both())


def test_a_store_that_is_given_up_before_it_is_forked_does_not_start(log: Path) -> None:
    async def ended_while_it_forks() -> None:
        store = Store("w/store1", log)
        await store.start(StandInZygote(lambda control, _: (children.append(control), store.close())), "127.0.0.1")  # type: ignore[arg-type, func-returns-value]

    with pytest.raises(WorldError, match="ended while it started"):
        asyncio.run(asyncio.wait_for(ended_while_it_forks(), DEADLINE_S))
    assert children[0].recv(1, socket.MSG_DONTWAIT) == b""  # and the child is told
