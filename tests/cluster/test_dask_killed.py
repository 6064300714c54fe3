"""A Dask cluster of separate processes, as a batch system starts them: cut off, killed and started again under a run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_llmcloud.cluster.clusters import ClusterPool
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.magics.session.world_client import RunResult, WorldClient
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.protocol.client import AgentChannel
from jupyter_llmcloud.storage.runs import RunStore
from tests.support.proxies import Wire
from tests.support.worlds import alive, numbered_lines, until

pytestmark = pytest.mark.slow
PROMISED_S = 30
COUNT = """
import os, time
i = 0
while not os.path.exists({flag!r}):
    print("line", i)
    run.log(x=1.0, step=i)
    i += 1
    time.sleep(0.02)
"""


class Dask:
    """`dask scheduler` and `dask worker` with its nanny; everything that reaches them goes through two wires."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scheduler_port, self.worker_port = free_port(), free_port()
        self.to_scheduler = Wire(("127.0.0.1", self.scheduler_port))
        self.to_worker = Wire(("127.0.0.1", self.worker_port))
        self.start_scheduler()
        self.start_worker()

    def start_scheduler(self) -> None:
        place = ["--host", "127.0.0.1", "--port", str(self.scheduler_port), "--dashboard-address", "127.0.0.1:0"]
        self.scheduler = self._start("scheduler", place)
        until(lambda: _listens(self.scheduler_port), "the scheduler listens", 30)

    def start_worker(self) -> None:
        """It speaks to the scheduler directly and tells it, and so everybody, the address of the wire."""
        contact = ["--contact-address", f"tcp://127.0.0.1:{self.to_worker.port}"]
        place = ["--listen-address", f"tcp://127.0.0.1:{self.worker_port}", "--dashboard-address", "127.0.0.1:0"]
        size = ["--name", "w0", "--nthreads", "1", "--memory-limit", "0"]
        self.nanny = self._start("worker", [f"tcp://127.0.0.1:{self.scheduler_port}", *place, *contact, *size])

    def _start(self, role: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{role}.log").open("ab") as log:
            command = [sys.executable, "-m", "dask", role, *arguments]
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)

    def workers(self) -> list[int]:
        found = []
        for child in psutil.Process(self.nanny.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "spawn" in str(child.cmdline()):
                    found.append(child.pid)
        return found

    def end(self) -> None:
        for process in (self.nanny, self.scheduler):
            process.kill()  # a worker ends with its nanny, its agent was asked to end
            process.wait()
        self.to_scheduler.close()
        self.to_worker.close()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    wire = Wire(("127.0.0.1", 0))
    wire.close()
    return wire.port


class Server:
    """A pool in a loop of its own, which reaches agents through Dask only."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.pool = ClusterPool(os.getpid(), 5, always_tunnel=True)

    def do(self, call: Awaitable[Any], timeout_s: float = 60) -> Any:
        async def wait() -> Any:
            return await call

        return asyncio.run_coroutine_threadsafe(wait(), self.loop).result(timeout_s)

    def agent_pids(self) -> list[int]:
        """Of the agents that can be asked now."""
        try:
            agents = self.do(self.pool.agents())
        except (LLMCloudError, OSError, TimeoutError):
            return []
        return [json.loads((Path(agent.home).parent / "agent.json").read_text())["pid"] for agent in agents]

    def end(self) -> None:
        self.do(self.pool.close())
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def dask(own_root: Path) -> Iterator[Dask]:
    own_root.mkdir()
    dask = Dask(own_root.parent)
    yield dask
    dask.end()


@pytest.fixture
def server(dask: Dask) -> Iterator[Server]:
    server = Server()
    server.do(server.pool.connect(f"tcp://127.0.0.1:{dask.to_scheduler.port}"))
    until(server.agent_pids, "the worker has its agent", 60)
    yield server
    server.end()


def message(world: WorldClient, name: str, code: str, background: bool = False) -> Execute:
    folder = str(RunStore().folder(name).path)
    return Execute(world_id=world.world_id, run_id=name, name=name, code=code, folder=folder, background=background)


def steps(name: str, rank: int = 0) -> list[int]:
    return [record["step"] for number, record in RunStore().folder(name).records("metrics") if number == rank]


def goes_on(name: str, num_steps: int = 10) -> None:
    """Its ranks take more steps from now on."""
    until(RunStore().folder(name).path.is_dir, f"{name} has begun")
    before = len(steps(name))
    until(lambda: len(steps(name)) > before + num_steps, f"{name} trains on")


@pytest.mark.story
@pytest.mark.alone
def test_a_run_survives_partitions_a_killed_nanny_and_a_killed_scheduler(
    dask: Dask, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placement = server.do(server.pool.place(None, 2))
    world = WorldClient.start(placement, "me")
    assert Path(world.channel.address).name != "agent.sock"  # through the tunnel
    pids = [row["pid"] for row in world.describe().ranks]
    agent = server.agent_pids()

    _a_cell_shows_everything_although_the_network_is_gone_for_a_while(dask, world, tmp_path, capsys)

    flag = tmp_path / "end"
    world.submit(message(world, "long", COUNT.format(flag=str(flag)), background=True))
    for kill in (_kill_worker, _kill_nanny, _kill_scheduler):
        began = time.monotonic()
        kill(dask)
        goes_on("long")
        until(lambda: server.agent_pids() == agent, f"control is back after {kill.__name__}", PROMISED_S)
        channel = AgentChannel(server.do(server.pool.agents())[0].address)
        channel.close()
        assert time.monotonic() - began < PROMISED_S, kill.__name__
    assert [row["pid"] for row in world.describe().ranks] == pids
    again = server.do(server.pool.place(None, 2))
    assert again["num_ranks"] == 2
    flag.touch()
    until(lambda: RunStore().folder("long").read().state == "finished", "the run has ended")
    for rank in (0, 1):
        assert steps("long", rank) == [*range(len(steps("long", rank)))]  # one copy, and nothing is missing
    assert agents_on_this_host(Path(again["agents"][0]["home"])) == agent
    assert all(map(alive, pids))
    world.stop()


def _a_cell_shows_everything_although_the_network_is_gone_for_a_while(
    dask: Dask, world: WorldClient, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = folder / "partition"
    wires = (dask.to_scheduler, dask.to_worker)
    cell = message(world, "cell", COUNT.format(flag=str(flag)))
    result: list[RunResult] = []

    def disturb() -> None:
        goes_on("cell")
        for harm in (Wire.hold, Wire.refuse, Wire.cut):
            for wire in wires:
                harm(wire)
            goes_on("cell", num_steps=75)  # the partition lasts as long as these steps: at least 1.5 s
            for wire in wires:
                wire.mend()
            goes_on("cell")
        flag.touch()

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    result.append(world.execute(cell, [0, 1]))
    thread.join(20)
    assert result[0].state == "finished"
    seen = numbered_lines(capsys.readouterr().out)
    for rank in (0, 1):
        assert seen[rank] == [*range(len(steps("cell", rank)))]


def _kill_worker(dask: Dask) -> None:
    """Its nanny starts another."""
    before = dask.workers()
    assert len(before) == 1
    os.kill(before[0], signal.SIGKILL)
    until(lambda: set(dask.workers()) - set(before), "there is another worker", PROMISED_S)


def _kill_nanny(dask: Dask) -> None:
    """Which takes its worker along; the batch system starts both again."""
    worker = dask.workers()
    dask.nanny.kill()
    dask.nanny.wait()
    until(lambda: not any(map(alive, worker)), "the worker ends with its nanny", 10)
    dask.start_worker()


def _kill_scheduler(dask: Dask) -> None:
    dask.scheduler.kill()
    dask.scheduler.wait()
    dask.nanny.terminate()
    dask.nanny.wait(20)
    dask.start_scheduler()
    dask.start_worker()


def agents_on_this_host(socket_path: Path) -> list[int]:
    """Every agent with this folder: a second copy would be seen here."""
    found = []
    for process in psutil.process_iter():
        try:
            if "jupyter_llmcloud.agent" in process.cmdline() and str(socket_path.parent) in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
