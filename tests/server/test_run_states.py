"""What the server says of a run whose leading agent has gone: another may come to lead it, then it is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_llmcloud.errors import ConnectionLost, NotFound, UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute, StartWorld
from jupyter_llmcloud.server.api import run_states
from jupyter_llmcloud.server.context import ServerContext
from jupyter_llmcloud.storage.leadership import Leadership, TermClaim
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore

SPEC = StartWorld(world_id="w", agents=[])


@pytest.fixture
def context(own_root: Path) -> ServerContext:
    """A server's, to which no agent answers."""
    return ServerContext(logging.getLogger("test"))


@pytest.fixture
def make_run(own_root: Path) -> Callable[..., RunFolder]:
    """Makes active runs, with restarts unless they are `plain`."""

    def make(name: str, plain: bool = False) -> RunFolder:
        folder = RunStore().folder(name)
        record = RunRecord(name, name, "running", time.time(), agent=str(own_root / "gone.sock"), world_id="w")
        folder.create(record, "x = 1")
        if not plain:
            cell = Execute(world_id="w", run_id=name, name=name, code="x = 1", max_restarts=1)
            Leadership(folder.path).claim(TermClaim(0, record.agent, socket.gethostname()))
            Leadership(folder.path).save(SPEC, cell, [])
        return folder

    return make


def state_of(folder: RunFolder, context: ServerContext) -> str:
    return asyncio.run(context.run_states.true_state(folder.read()))


def test_a_run_without_restarts_is_lost_with_its_agent(context: ServerContext, make_run: Callable[..., Any]) -> None:
    assert state_of(make_run("plain", plain=True), context) == "lost"


def test_a_run_with_restarts_is_lost_when_no_other_agent_has_come_to_lead_it(
    context: ServerContext, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("train")
    assert state_of(folder, context) == "running"
    assert folder.read().state == "running"
    monkeypatch.setattr(run_states, "TAKEOVER_S", 0.0)
    assert state_of(folder, context) == "lost"
    assert folder.read().state == "lost"
    assert not Leadership(folder.path).claim(TermClaim(1, "late.sock", "host")), "an agent that comes too late leads it"
    assert not Leadership(folder.path).can_be_taken


def test_a_run_that_another_agent_has_just_claimed_is_not_lost(
    context: ServerContext, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, newest = make_run("train"), Leadership.newest
    monkeypatch.setattr(run_states, "TAKEOVER_S", 0.0)

    def claimed_meanwhile(leadership: Leadership) -> TermClaim | None:
        found = newest(leadership)
        leadership.claim(TermClaim(1, "b.sock", "two"))
        return found

    monkeypatch.setattr(Leadership, "newest", claimed_meanwhile)
    assert state_of(folder, context) == "running"
    assert folder.read().state == "running"


def test_stop_ends_a_run_that_nobody_leads_at_once_and_for_good(
    context: ServerContext, make_run: Callable[..., Any]
) -> None:
    folder = make_run("train")
    assert asyncio.run(context.run_states.stop(folder.read())) == "stopped"
    assert folder.read().state == "stopped"
    assert not Leadership(folder.path).claim(TermClaim(1, "late.sock", "host"))
    with pytest.raises(ConnectionLost):
        asyncio.run(context.run_states.stop(make_run("plain", plain=True).read()))


def test_a_run_that_an_agent_claims_while_its_former_leader_is_asked_is_not_ended_over_it(
    context: ServerContext, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was ended over the one that had just begun to lead it, which wrote "running" over that: the run was lost."""
    folder = make_run("train")
    leadership, asked = Leadership(folder.path), []

    async def leader(record: RunRecord) -> Any:
        asked.append(record)
        leadership.claim(TermClaim(1, "b.sock", "two"))
        raise ConnectionLost("nobody listens") from ConnectionRefusedError()

    monkeypatch.setattr(context.run_states, "_leader", leader)
    monkeypatch.setattr(run_states, "connected", lambda error: False)
    monkeypatch.setattr(run_states, "TAKEOVER_S", 0.0)
    assert asyncio.run(context.run_states.true_state(folder.read())) == "running"
    assert (folder.read().state, leadership.newest()) == ("running", TermClaim(1, "b.sock", "two"))
    assert asyncio.run(context.run_states.stop(folder.read())) == "stopped", "asked once more, it does not answer"
    assert len(asked) == 2


def test_the_leader_is_reached_where_it_is_now(context: ServerContext, own_root: Path) -> None:
    class Agent:
        host, home, address = "two", "/there/agent.sock", "/here/bridge.sock"

    class Pool:
        async def agents(self, name: str | None) -> list[Any]:
            assert name == "wide"
            return [Agent()]

    async def make_pool() -> Any:
        return Pool()

    context.clusters.make_pool = make_pool
    begun = RunRecord("r", "r", agent="/a.sock", cluster="wide")
    assert asyncio.run(context.run_states.leader_address(begun)) == "/a.sock"
    moved = RunRecord("r", "r", agent="/there/agent.sock", host="two", cluster="wide")
    assert asyncio.run(context.run_states.leader_address(moved)) == "/here/bridge.sock"
    (own_root / "agent.sock").parent.mkdir(exist_ok=True)
    (own_root / "agent.sock").touch()
    here = RunRecord("r", "r", agent=str(own_root / "agent.sock"), host=socket.gethostname())
    assert asyncio.run(context.run_states.leader_address(here)) == here.agent
    with pytest.raises(NotFound, match="on three"):
        asyncio.run(context.run_states.leader_address(RunRecord("r", "r", agent="/x", host="three", cluster="wide")))


@pytest.mark.parametrize(("alive", "state"), [(True, "queued"), (False, "lost")])
def test_a_run_without_an_agent_is_lost_when_the_kernel_that_starts_it_has_gone(
    context: ServerContext, own_root: Path, alive: bool, state: str
) -> None:
    started = psutil.Process().create_time() if alive else 1.0
    folder = RunStore().folder("starting-1")
    starter = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    folder.create(RunRecord("starting-1", "starting", created=time.time(), starter=starter), "x = 1")
    assert state_of(folder, context) == folder.read().state == state
    if alive:
        with pytest.raises(UsageError, match="interrupt the kernel"):
            asyncio.run(context.run_states.stop(folder.read()))
