"""A world over two hosts with addresses and names of their own: scheduler, workers and this test on four hosts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask
import psutil
import pytest
from distributed import Security

from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError
from jupyter_llmcloud.protocol.agent_messages import DescribeWorld, ResizeWorld
from jupyter_llmcloud.protocol.client import AgentChannel
from tests.support.clusters import Server
from tests.support.hosts import DaskOverHosts, Host, network
from tests.support.resuming import cell, notes, results, resumed, same
from tests.support.worlds import AgentElsewhere, Ranks, alive, until

pytestmark = [pytest.mark.story, pytest.mark.slow]
LEASE_S = 8.0
COUNTS = """
import time
for i in range(250):
    print("line", i, flush=True)
    time.sleep(0.04)
"""
SUM = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nint(t)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskOverHosts]:
    folder = tmp_path_factory.mktemp("hosts")
    security = Security.temporary()
    (folder / "ca.pem").write_text(security.tls_ca_file)
    (folder / "key.pem").write_text(security.tls_client_key)
    (folder / "cert.pem").write_text(security.tls_client_cert)
    files = {"ca-file": "ca.pem"}
    for role in ("scheduler", "worker", "client"):
        files |= {f"{role}.key": "key.pem", f"{role}.cert": "cert.pem"}
    settings: dict[str, Any] = {f"distributed.comm.tls.{name}": str(folder / file) for name, file in files.items()}
    settings |= {"distributed.comm.require-encryption": True, "distributed.worker.daemon": False}
    environ = {f"DASK_{key.replace('.', '__').replace('-', '_').upper()}": str(settings[key]) for key in settings}
    with network("head", "one", "two", "three") as (head, *nodes), dask.config.set(settings):
        dask_cluster = DaskOverHosts(head, nodes, folder, environ)
        dask_cluster.start()
        yield dask_cluster


@pytest.fixture(scope="module")
def server(cluster: DaskOverHosts) -> Iterator[Server]:
    server = Server()
    server.do(server.pool.connect(cluster.address, "wide", 1))
    until(lambda: len(server.do(server.pool.agents())) == 3, "the workers are there", 60)
    yield server
    server.end()


@pytest.fixture
def make_world(server: Server, cluster: DaskOverHosts) -> Iterator[Callable[..., Ranks]]:
    """Makes one rank on each of its hosts; a third host has room."""
    worlds: list[Ranks] = []

    def make(num_ranks: int = 2, **spec: Any) -> Ranks:
        worlds.append(server.world(num_ranks, **spec))
        return worlds[-1]

    yield make
    for world in worlds:
        world.channel.close()
        with contextlib.suppress(LLMCloudError):
            world.channel = world.agent.channel()
        world.end()

    def are_free() -> bool:
        cluster.start_ended_workers()
        return sum(agent.free_slots for agent in server.agents()) == 3

    try:
        until(are_free, "every slot is free again", 90)
    except pytest.fail.Exception as failed:
        pytest.fail(f"{failed}: {server.agents()}")


@pytest.fixture
def world(make_world: Callable[..., Ranks]) -> Ranks:
    return make_world()


def host_of(world: Ranks, rank: int, cluster: DaskOverHosts) -> Host:
    name = world.describe()["ranks"][rank]["host"]
    return next(node for node in cluster.nodes if node.name == name)


def dask_worker(host: Host) -> psutil.Process:
    """The process that the nanny there has spawned."""
    return next(psutil.Process(pid) for pid in host.pids() if "spawn_main" in command_of(pid))


def command_of(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def described(world: Ranks) -> dict[str, Any] | None:
    """The world, by a connection of its own."""
    with contextlib.suppress(LLMCloudError), contextlib.closing(AgentChannel(world.agent.address)) as channel:
        return channel.request(DescribeWorld(world_id=world.world_id), 5).as_dict()
    return None


def test_cells_stop_and_kill_work_over_two_hosts_and_nothing_listens_beyond_their_network(
    world: Ranks, cluster: DaskOverHosts
) -> None:
    told = "print(socket.gethostname(), socket.gethostbyname(socket.gethostname()), os.environ['GLOO_SOCKET_IFNAME'])\n"
    outcome = world.ok("import socket, os\n" + told + SUM)
    assert outcome.results() == ["2", "2"]
    hosts = [host_of(world, rank, cluster) for rank in (0, 1)]
    assert [outcome.text(rank) for rank in (0, 1)] == [f"{host.name} 127.0.1.1 {host.interface}\n" for host in hosts]
    assert hosts[0].interface != hosts[1].interface
    for host in cluster.nodes:
        assert host.listening() <= {host.address, "127.0.0.1"}

    running = world.send("kept = rank\nprint('in it')\n" + SUM.replace("int(t)", "while True: dist.all_reduce(t)"))
    outcome = running.wait_for("in it", times=2).stop().end()
    assert outcome.state == "stopped"
    assert outcome.seconds < 8
    assert world.ok("kept").results() == ["0", "1"]

    outcome = world.run("import os, signal\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n" + SUM)
    assert (outcome.state, outcome.error["rank"], outcome.error["ename"]) == ("failed", 1, "RankKilled")
    assert world.ok("kept if rank == 0 else 'new'").results() == ["0", "'new'"]
    assert host_of(world, 1, cluster) is hosts[1]


def test_a_world_of_one_host_grows_onto_another(make_world: Callable[..., Ranks], cluster: DaskOverHosts) -> None:
    """Its store was on loopback, where no other host can reach it."""
    world = make_world(1)
    assert world.ok("kept = 5\nimport os\nos.environ['MASTER_ADDR']").results() == ["'127.0.0.1'"]
    world.channel.request(ResizeWorld(world_id=world.world_id, num_ranks=2), 60)
    world.size = 2
    assert world.ok(SUM).results() == ["2", "2"]
    assert world.pull("kept") == 5
    first, second = (host_of(world, rank, cluster) for rank in (0, 1))
    assert first is not second
    assert (
        world.ok("os.environ['MASTER_ADDR'] if rank == 0 else __import__('os').environ['MASTER_ADDR']").results()
        == [f"'{first.address}'"] * 2
    )


def test_a_killed_dask_worker_of_either_host_leaves_the_run_training(
    make_world: Callable[..., Ranks], cluster: DaskOverHosts
) -> None:
    """Leader and follower speak through the workers: what they say waits for those that take their place."""
    world = make_world(link_lease_s=60.0)  # the machine may be busy
    pids, hosts = world.pids(), [host_of(world, rank, cluster) for rank in (0, 1)]
    running = world.send(COUNTS).wait_for("line 20\n", times=2)
    for rank in (0, 1):
        worker = dask_worker(hosts[rank])
        worker.kill()
        until(lambda worker=worker: not alive(worker.pid), "it has gone")
    # The kernel's own connection went through the leader's worker.
    with pytest.raises(ConnectionLost):
        running.end(30)
    folder = running.outcome.folder
    until(lambda: not folder.read().is_active, "the run has ended", 60)
    assert folder.read().state == "finished"
    for rank in (0, 1):
        texts = [record["text"] for number, record in folder.records("logs") if number == rank]
        assert "".join(texts) == "".join(f"line {i}\n" for i in range(250))
    again = until(lambda: described(world), "the world is reached again", 60)
    assert [row["pid"] for row in again["ranks"]] == pids
    world.channel.close()
    world.channel = world.agent.channel()
    assert world.ok(SUM).results() == ["2", "2"]


def test_a_run_without_restarts_ends_by_naming_the_rank_whose_host_fell_silent(
    make_world: Callable[..., Ranks], cluster: DaskOverHosts
) -> None:
    """Its peer waits in a collective for what the pulled cable will never bring."""
    world = make_world(link_lease_s=6.0)
    world.ok("kept = rank")
    code = SUM.replace("int(t)", "print('in it', flush=True)\nwhile True: dist.all_reduce(t)")
    running = world.send(code).wait_for("in it", times=2)
    lost = host_of(world, 1, cluster)
    pid = world.pids()[1]
    lost.unplug()
    try:
        outcome = running.end(60)
        until(lambda: not alive(pid), "no rank trains on where nobody can stop it", 30)
    finally:
        lost.plug_in()
    assert outcome.state == "failed"
    assert outcome.error["rank"] == 1, outcome.ended.errors
    assert lost.name in outcome.error["evalue"], outcome.error
    assert world.ok("kept if rank == 0 else 'new'").results() == ["0", "'new'"]


def test_a_run_whose_host_falls_silent_goes_on_on_another_to_the_same_weights(
    make_world: Callable[..., Ranks], cluster: DaskOverHosts
) -> None:
    """The cable of the follower's host is pulled: nobody is told. With --max-restarts the run resumes elsewhere."""
    world = make_world(link_lease_s=LEASE_S)
    world.ok(cell("accelerate"))
    wanted = results(world)
    waits = "print('unplug me', flush=True); signal.pause()"
    code = cell("accelerate", 25).replace("os.kill(os.getpid(), signal.SIGKILL)", waits)
    running = world.send(code, checkpoint_every=4, max_restarts=3).wait_for("unplug me")
    lost, began = host_of(world, 1, cluster), time.monotonic()
    pid = world.pids()[1]
    lost.unplug()
    try:
        outcome = running.end(120)
        assert outcome.state == "finished", outcome.ended.errors
        print(f"resumed and finished {time.monotonic() - began:.1f} s after the cable was pulled")
        assert not alive(pid), "two copies"
    finally:
        lost.plug_in()
    assert any("rank 1 was lost" in note and "resumed from step" in note for note in resumed(outcome))
    assert any("rank 1 moved to" in note for note in notes(outcome))
    for rank, result in enumerate(results(world)):
        assert same(wanted[rank], result), f"rank {rank}"
    assert host_of(world, 1, cluster) is not lost


def test_a_run_whose_leading_host_falls_silent_goes_on_under_another_to_the_same_weights(
    make_world: Callable[..., Ranks], server: Server, cluster: DaskOverHosts
) -> None:
    """The cable of the leader's host is pulled: nobody can tell that it trains no more, and nothing of it may.

    It is plugged in again while the other one trains.
    """
    world = make_world(link_lease_s=6.0)
    world.ok(cell("accelerate"))
    wanted = results(world)
    waits = "print('unplug me', flush=True); signal.pause()"
    code = cell("accelerate", 25).replace("os.kill(os.getpid(), signal.SIGKILL)", waits)
    running = world.send(code, checkpoint_every=4, max_restarts=3).wait_for("unplug me")
    lost, pids, folder = host_of(world, 0, cluster), world.pids(), running.outcome.folder
    lost.unplug()
    try:
        until(lambda: folder.read().host, "another agent leads it", 60)
        assert not any(map(alive, pids)), "two copies"
    finally:
        lost.plug_in()
    until(lambda: not folder.read().is_active, "the run has ended", 60)
    record = folder.read()
    assert record.state == "finished", record.errors
    assert record.host != lost.name
    [leader] = [agent for agent in server.agents() if (agent.host, agent.home) == (record.host, record.agent)]
    mine = world.beside(AgentElsewhere(leader.address))
    for rank, result in enumerate(results(mine)):
        assert same(wanted[rank], result), f"rank {rank}"
    mine.end()
    assert folder.read() == record, "a leader that came too late has written"
