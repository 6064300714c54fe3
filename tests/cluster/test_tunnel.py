"""Agents are reached through Dask's own connections where their sockets are not on this host: straight, or relayed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Security

from jupyter_llmcloud.cluster.clusters import ClusterPool
from jupyter_llmcloud.cluster.tunnel import relay
from jupyter_llmcloud.errors import ConnectionLost
from jupyter_llmcloud.protocol.agent_messages import DescribeWorld, Execute, Journaled, RunEnded, StartWorld, StopWorld
from jupyter_llmcloud.protocol.client import AgentChannel, AgentConnection
from jupyter_llmcloud.protocol.frames import Message, replace
from jupyter_llmcloud.storage.runs import RunFolder, RunStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_root")]
FAR = "tests.support.far_cluster:FarCluster"
UNDER_WAY = 24 << 20  # what windows, sockets and buffers hold together at most, generously


@contextlib.asynccontextmanager
async def far_cluster(kind: str = "local") -> AsyncIterator[ClusterPool]:
    """Two workers, each reached as if it were on another host."""
    pool = ClusterPool(os.getpid(), 2, always_tunnel=True)
    try:
        await pool.start(kind, workers=2, options={"slots": 1})
        yield pool
    finally:
        await pool.close()


@pytest.mark.story
def test_a_world_over_two_workers_runs_cells_through_tunnels() -> None:
    """Kernel to leader, and leader to follower: neither uses the other's own socket, and all output arrives."""

    async def run() -> None:
        async with far_cluster() as pool:
            await _everything_goes_through_tunnels(pool, straight=True)

    asyncio.run(run())


async def _everything_goes_through_tunnels(pool: ClusterPool, straight: bool) -> None:
    assert [await _is_reached(agent.worker) for agent in await pool.agents()] == [straight] * 2
    placement = await pool.place(None, 2)
    homes = {agent.home for agent in await pool.agents()}
    assert not homes & {allocation["address"] for allocation in placement["agents"]}
    assert placement["agents"][1]["home"] not in homes
    heard = await asyncio.to_thread(_run_a_cell, placement)
    text = "".join(r["text"] for m in heard if isinstance(m, Journaled) for r in m.records if r["kind"] == "stdout")
    assert text.count("the sum is 3.0") == 2
    ended = heard[-1]
    assert isinstance(ended, RunEnded) and ended.state == "finished", ended
    await _bytes_arrive(pool)


async def _is_reached(worker: str) -> bool:
    host, port = worker.rpartition("/")[2].split(":")
    try:
        reader, _ = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(1.0):
            await reader.read()
    except OSError as error:
        return isinstance(error, TimeoutError)  # it waits for the handshake to begin
    return False


def _run_a_cell(placement: dict) -> list[Message]:
    channel = AgentChannel(placement["agents"][0]["address"])
    channel.request(StartWorld(world_id="w", agents=placement["agents"]), 120)
    code = (
        "import torch, torch.distributed as dist\nt = torch.ones(1) * (rank + 1)\n"
        "dist.all_reduce(t)\nprint('the sum is', t.item())"
    )
    folder = str(RunStore().folder("tunnelled").path)
    channel.send(Execute(world_id="w", run_id="tunnelled", name="tunnelled", code=code, folder=folder))
    heard: list[Message] = []
    while not heard or not isinstance(heard[-1], RunEnded):
        message = channel.receive(60)
        assert message is not None, heard
        heard.append(message)
    channel.request(StopWorld(world_id="w"))
    channel.close()
    return heard


# --- what a tunnel does with bytes ---


async def _bytes_arrive(pool: ClusterPool) -> None:
    """A socket beside an agent, spoken to through its tunnel."""
    agent = (await pool.agents())[0]
    here = Path(agent.home).parent / "far.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here))
        listener.listen()
        path = await pool.reach_replica((await pool.list())[0].name, agent, str(here))
        for check in (_a_reader_that_does_not_read_stops_its_writer, _what_was_sent_before_the_end_arrives):
            await asyncio.to_thread(check, path, listener)
    here.unlink()
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(20)
        late.connect(path)
        assert await asyncio.to_thread(late.recv, 100) == b""  # nobody is there: told at once


def _pair(path: str, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    listener.settimeout(20)
    near = socket.socket(socket.AF_UNIX)
    near.connect(path)
    far, _ = listener.accept()
    for end in (near, far):
        end.settimeout(20)
    return near, far


def _a_reader_that_does_not_read_stops_its_writer(path: str, listener: socket.socket) -> None:
    for swap in (False, True):
        ends = _pair(path, listener)
        source, target = reversed(ends) if swap else ends
        source.settimeout(1.0)
        block, sent = os.urandom(1 << 18), 0
        with contextlib.suppress(TimeoutError):
            while sent <= 2 * UNDER_WAY:
                sent += source.send(block[sent % len(block) :])
        assert (1 << 20) < sent < UNDER_WAY
        target.sendall(b"the other direction is open")
        assert source.recv(100)
        got = bytearray()
        while len(got) < sent:
            got += target.recv(1 << 20)
        wanted = block * (sent // len(block) + 1)
        assert got == wanted[:sent]
        for end in ends:
            end.close()


def _what_was_sent_before_the_end_arrives(path: str, listener: socket.socket) -> None:
    near, far = _pair(path, listener)
    answer = os.urandom(5 << 20)
    near.sendall(b"question")
    near.shutdown(socket.SHUT_WR)
    assert far.recv(100) == b"question"
    assert far.recv(100) == b""
    writer = threading.Thread(target=lambda: (far.sendall(answer), far.close()))
    writer.start()
    got = bytearray()
    while data := near.recv(1 << 20):
        got += data
    writer.join()
    assert got == answer
    near.close()


# --- what they lead through is killed ---


@pytest.mark.soak
def test_a_scheduler_that_passes_everything_on_may_be_killed_under_a_run() -> None:
    """Only it reaches the workers. Leader and follower find each other again through those that take the place."""

    async def run() -> None:
        async with far_cluster(FAR) as pool:
            await _everything_goes_through_tunnels(pool, straight=False)
            placement = await pool.place(None, 2)
            leader = placement["agents"][0]["address"]
            folder = RunStore().folder("long")
            async with await AgentConnection.open(leader) as kernel:
                await kernel.request(StartWorld(world_id="w", agents=placement["agents"], link_lease_s=60.0), 120)
                code = "import time\nfor i in range(300):\n    print('line', i, flush=True)\n    time.sleep(0.04)"
                cell = Execute(world_id="w", run_id="long", name="long", code=code, folder=str(folder.path))
                await kernel.request(replace(cell, background=True))
                before = (await kernel.request(DescribeWorld(world_id="w"))).ranks
            await _soon(lambda: _have_written(folder, 20))
            [record] = await pool.list()
            os.kill(record.pid, signal.SIGKILL)
            [again] = await pool.list()
            assert again.pid != record.pid
            await _soon(lambda: _has_ended(folder))
            assert folder.read().state == "finished", folder.read().errors
            for rank in (0, 1):
                text = "".join(row["text"] for number, row in folder.records("logs") if number == rank)
                assert text == "".join(f"line {i}\n" for i in range(300))
            async with await AgentConnection.open(leader) as kernel:
                after = (await kernel.request(DescribeWorld(world_id="w"))).ranks
                await kernel.request(StopWorld(world_id="w"))
            assert [row["pid"] for row in before] == [row["pid"] for row in after]

    asyncio.run(run())


async def _have_written(folder: RunFolder, num_lines: int) -> bool:
    return all(sum(number == rank for number, _ in folder.records("logs")) >= num_lines for rank in (0, 1))


async def _has_ended(folder: RunFolder) -> bool:
    return not folder.read().is_active


def test_ends_that_close_in_the_middle_of_the_greeting_lead_nowhere_and_no_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the library below makes of a connection that is reset: tornado raises a ValueError for some of them."""
    monkeypatch.setattr(relay, "CONNECT_TIMEOUT_S", 0.3)
    security = Security.temporary()

    async def run() -> None:
        resets = await asyncio.start_server(lambda _, writer: writer.transport.abort(), "127.0.0.1", 0)
        async with resets:
            port = resets.sockets[0].getsockname()[1]
            address = f"tls://127.0.0.1:{port}"
            way = relay.SocketRoutes(lambda: address, lambda: security.get_connection_args("client"))
            for _ in range(5):
                with pytest.raises(ConnectionLost, match=r"far.*direct: .*relayed: |far.*relayed: .*direct: "):
                    await way.open(address, "far", "/a/agent.sock")

    asyncio.run(run())


# --- a cluster that somebody else has started ---


def test_a_connected_cluster_without_tls_is_reached_through_its_scheduler() -> None:
    """And when its worker is killed, the agent is there again under the same socket."""

    async def run() -> None:
        command = [sys.executable, "-m", "tests.support.far_cluster"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
            assert cluster.stdout is not None
            pool = ClusterPool(os.getpid(), 2, always_tunnel=True)
            try:
                await pool.connect(cluster.stdout.readline().strip(), "far")
                [before] = await pool.agents()
                assert before.num_slots
                [worker] = _dask_workers(cluster.pid)
                worker.kill()
                after = await _soon(lambda: _agent_of_another_process(pool, worker.pid))
                assert (after.address, after.home) == (before.address, before.home)
            finally:
                await pool.close()
                cluster.communicate()

    asyncio.run(run())


def _dask_workers(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


async def _agent_of_another_process(pool: ClusterPool, pid: int) -> Any:
    if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        return None
    with contextlib.suppress(ConnectionLost):
        return next(iter(await pool.agents()), None)
    return None


async def _soon(ask: Callable[[], Awaitable[Any]], timeout_s: float = 60) -> Any:
    async with asyncio.timeout(timeout_s):
        while not (answer := await ask()):
            await asyncio.sleep(0.05)
    return answer
