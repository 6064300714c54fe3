"""A node agent that is killed or stands still: its runs are told as what they are, and the next world works."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_llmcloud.errors import ConnectionLost, NotFound
from jupyter_llmcloud.server.api import run_states
from jupyter_llmcloud.server.context import ServerContext
from jupyter_llmcloud.storage.runs import RunFolder
from tests.cluster.test_clusters import Server, agent_pid
from tests.support.worlds import Running, alive, until

pytestmark = pytest.mark.slow


@pytest.fixture
def server(own_root: Path) -> Iterator[Server]:
    server = Server()
    server.do(server.pool.start(workers=1, options={"slots": 2}))
    yield server
    server.end()


def _sleeps(server: Server, **options: Any) -> Running:
    world = server.world(2)
    running = world.send("import time\nprint('in it')\ntime.sleep(100)", agent=world.agent.address, **options)
    return running.wait_for("in it", times=2)


def test_a_run_of_a_killed_agent_is_lost_for_good_and_a_new_agent_takes_the_place(server: Server) -> None:
    context = ServerContext(logging.getLogger("test"))
    running = _sleeps(server)
    folder = running.outcome.folder
    [agent] = server.agents()
    assert asyncio.run(context.run_states.true_state(folder.read())) == "running"
    killed, pids = agent_pid(agent), running.ranks.pids()
    zygote = psutil.Process(pids[0]).ppid()
    os.kill(killed, signal.SIGKILL)

    [replaced] = until(lambda: _agents_but(server, killed), "there is a new agent", 60)
    assert replaced.address == agent.address
    assert replaced.free_slots == 2
    assert not any(alive(pid) for pid in pids)
    assert asyncio.run(context.run_states.true_state(folder.read())) == "lost"
    record = folder.read()
    assert (record.state, record.is_active) == ("lost", False)
    assert "agent" in record.history[-1]["why"]
    context.runs.delete(record.run_id)

    world = server.world(2)
    assert world.ok("rank").results() == ["0", "1"]
    assert psutil.Process(world.pids()[0]).ppid() == zygote  # what it has imported is not imported again
    running.ranks.channel.close()
    world.end()


def _agents_but(server: Server, pid: int) -> list[Any]:
    with contextlib.suppress(ConnectionLost, NotFound, FileNotFoundError):  # while it is being replaced
        return [agent for agent in server.agents() if agent_pid(agent) != pid]
    return []


def test_a_run_whose_agent_stands_still_is_not_lost_until_it_is_silent_for_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_states, "ASK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(run_states, "SILENT_S", 1.0)
    context = ServerContext(logging.getLogger("test"))
    running = _sleeps(server)
    folder: RunFolder = running.outcome.folder
    [agent] = server.agents()
    pid = agent_pid(agent)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert asyncio.run(context.run_states.true_state(folder.read())) == "running"
        until(lambda: asyncio.run(context.run_states.true_state(folder.read())) == "lost", "it counts as lost", 10)
        assert folder.read().state == "running", "nobody but its agent may write that down"
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: asyncio.run(context.run_states.true_state(folder.read())) == "running", "it is heard again", 10)
    assert running.stop().end().state == "stopped"
    running.ranks.end()
