"""What the server says of a run whose leading agent has gone: another may come to lead it, then it is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.errors import ConnectionLost, NotFound, UsageError
from jupyter_llmcloud.protocol.agent_messages import Describe, Execute, StartWorld
from jupyter_llmcloud.protocol.connection import bridge_name
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


@pytest.mark.parametrize("owner", ["server", "kernel"])
def test_what_is_known_of_a_run_from_before_its_agent_had_it_does_not_end_it(
    context: ServerContext, own_root: Path, owner: str
) -> None:
    """A list of many runs takes a while: what was queued when its record was read is running when it is asked."""
    folder = RunStore().folder("begun-1")
    gone = {"host": socket.gethostname(), "pid": os.getpid(), "started": 1.0}
    about: dict[str, Any] = {"owner": "server:0123456789abcdef"} if owner == "server" else {"starter": gone}
    folder.create(RunRecord("begun-1", "begun", created=time.time(), **about), "x = 1")
    read_before = folder.read()
    folder.write(RunRecord("begun-1", "begun", "running", agent=str(own_root / "agent.sock"), world_id="w", **about))
    assert asyncio.run(context.run_states.true_state(read_before)) == "running"
    assert folder.read().state == "running"


def test_what_is_known_of_a_leader_says_nothing_of_the_one_after_it(
    context: ServerContext, make_run: Callable[..., Any], own_root: Path
) -> None:
    folder = make_run("moved", plain=True)
    read_before = folder.read()
    folder.write(RunRecord("moved", "moved", "running", agent=str(own_root / "next.sock"), host="two", world_id="w"))
    assert asyncio.run(context.run_states.true_state(read_before)) == "running"
    assert folder.read().state == "running"


def test_a_run_whose_folder_is_removed_while_its_agent_is_looked_for_is_lost(
    context: ServerContext, make_run: Callable[..., Any]
) -> None:
    folder = make_run("removed", plain=True)
    record = folder.read()
    shutil.rmtree(folder.path)
    assert asyncio.run(context.run_states.true_state(record)) == "lost"


def bridged(own_root: Path, make_run: Callable[..., Any]) -> tuple[RunFolder, Path]:
    """A run on another host, and the socket here that stands for its agent as long as a server holds it."""
    folder = make_run("far", plain=True)
    socket_path = own_root / "c" / "1" / bridge_name("/there/agent.sock")
    socket_path.parent.mkdir(parents=True)
    record = folder.read()
    record.agent = str(socket_path)
    folder.write(record)
    return folder, socket_path


class AnsweringAgent:
    """A connection to an agent that leads the run."""

    async def __aenter__(self) -> AnsweringAgent:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def request(self, message: Describe) -> Any:
        return SimpleNamespace(worlds=[{"world_id": "w"}])


async def test_a_run_on_another_host_is_not_lost_with_the_server_that_stood_for_its_agent(
    context: ServerContext, make_run: Callable[..., Any], own_root: Path
) -> None:
    """The next one stands there again, with the clusters that it takes up: its agent is asked then."""
    folder, path = bridged(own_root, make_run)

    async def make_pool() -> Any:
        path.touch()
        return SimpleNamespace()

    async def open_agent(address: str) -> Any:
        try:
            os.stat(address)
        except FileNotFoundError as error:
            raise ConnectionLost(f"{address} does not answer: {error}") from None
        return AnsweringAgent()

    context.clusters.make_pool, context.clusters.open_agent = make_pool, open_agent
    assert await context.run_states.true_state(folder.read()) == folder.read().state == "running"


async def test_a_run_on_another_host_is_lost_for_good_with_its_cluster_alone(
    context: ServerContext, make_run: Callable[..., Any], own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = bridged(own_root, make_run)

    async def make_pool() -> Any:
        return SimpleNamespace()

    context.clusters.make_pool = make_pool
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # of a server that was killed
    for _ in range(2):
        assert await context.run_states.true_state(folder.read()) == "running"
        path.unlink(missing_ok=True)
    monkeypatch.setattr(run_states, "SILENT_S", 0.0)
    assert await context.run_states.true_state(folder.read()) == "lost", "nobody has reached it for long"
    assert folder.read().state == "running", "until it is heard again"
    with pytest.raises(ConnectionLost):
        await context.run_states.stop(folder.read())
    shutil.rmtree(path.parent)
    assert await context.run_states.true_state(folder.read()) == folder.read().state == "lost"


async def test_a_run_that_has_moved_on_a_cluster_of_another_server_is_not_ended_by_one_that_cannot_ask(
    context: ServerContext, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second server took what it does not know for gone, and claimed the lead 90 s later: the run was lost."""
    folder = make_run("wide")
    record = folder.read()
    record.agent, record.host, record.cluster = "/there/agent.sock", "two", "of-another"
    folder.write(record)

    class Pool:
        async def agents(self, name: str | None) -> list[Any]:
            raise NotFound(f"there is no cluster {name!r}.")

    async def make_pool() -> Any:
        return Pool()

    context.clusters.make_pool = make_pool
    monkeypatch.setattr(run_states, "TAKEOVER_S", 0.0)
    started = psutil.Process().create_time()
    other = ClusterRecord(
        "0123abcd", "of-another", "ssh", state="running", owner_pid=os.getpid(), owner_started=started
    )
    other.save()
    assert await context.run_states.true_state(folder.read()) == folder.read().state == "running"
    with pytest.raises(ConnectionLost, match="of another server"):
        await context.run_states.stop(folder.read())
    other.forget()
    assert await context.run_states.true_state(folder.read()) == folder.read().state == "lost"
