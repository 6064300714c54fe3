"""Real Dask clusters: started, scaled, adopted, stopped; their agents and ranks outlive workers, not their lease."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

from jupyter_llmcloud import config
from jupyter_llmcloud.cluster import dask_client
from jupyter_llmcloud.cluster.agent_info import AgentInfo
from jupyter_llmcloud.cluster.clusters import ClusterPool
from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.core.scheduling.priorities import Lender, Shortage, give_way
from jupyter_llmcloud.core.scheduling.replica_room import ReplicaNeeds
from jupyter_llmcloud.core.serving.models.cell_source import CellSource
from jupyter_llmcloud.errors import Busy, CapacityError, ConnectionLost, LLMCloudError, NameTaken, NotFound, UsageError
from jupyter_llmcloud.protocol.agent_messages import EndReplica, LaunchReplica
from jupyter_llmcloud.protocol.client import AgentConnection
from jupyter_llmcloud.storage.models.served_code import write_cell
from tests.chaos.starts import OWNERS, Contest
from tests.support.worlds import AgentElsewhere, Ranks, alive, until

pytestmark = pytest.mark.slow

SUM = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nint(t)"
WORKS_UNTIL = """
import os, time
print("in it")
step = 0
while not os.path.exists({flag!r}):
    step += 1
    run.log(step=step)
    time.sleep(0.02)
"""


class Server:
    """A pool in an event loop of its own, as a Jupyter server holds it, and calls to it from a test."""

    def __init__(self, owner_pid: int | None = None, lease_s: float = 2.0) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.pool = ClusterPool(owner_pid or os.getpid(), lease_s)

    def begin(self, call: Awaitable[Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(_awaited(call), self.loop)

    def do(self, call: Awaitable[Any], timeout_s: float = 120) -> Any:
        return self.begin(call).result(timeout_s)

    def agents(self, name: str | None = None) -> list[AgentInfo]:
        return list(self.do(self.pool.agents(name)))

    def world(self, num_ranks: int) -> Ranks:
        placement = self.do(self.pool.place(None, num_ranks))
        leader = AgentElsewhere(placement["agents"][0]["address"])
        return Ranks(leader, num_ranks, agents=placement["agents"])

    def end(self) -> None:
        """Stop every cluster, then the loop."""
        self.do(self.pool.close())
        self.leave()

    def leave(self) -> None:
        """Go without stopping anything."""
        self.do(self.pool.release())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with a local cluster of two workers, two slots on each."""
    server = Server()
    server.do(server.pool.start(workers=2, options={"slots": 2}))
    yield server
    server.end()


@pytest.fixture
def own_server(own_root: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers that know nothing of other tests' clusters."""
    servers: list[Server] = []

    def make(**options: Any) -> Server:
        servers.append(Server(**options))
        return servers[-1]

    yield make
    for server in servers:
        if server.loop.is_running():
            server.end()


def record_of(server: Server) -> ClusterRecord:
    [record] = server.do(server.pool.list())
    return record  # type: ignore[no-any-return]


def agent_pid(agent: AgentInfo) -> int:
    return int(json.loads((Path(agent.address).parent / "agent.json").read_text())["pid"])


def everybody(server: Server) -> list[psutil.Process]:
    """The host process of the cluster, its scheduler and workers, the agents and all below them."""
    roots = [record_of(server).pid, *map(agent_pid, server.agents())]
    found = [psutil.Process(pid) for pid in roots]
    return found + [child for process in found for child in process.children(recursive=True)]


# --- start ---


def test_a_started_cluster_says_what_it_is(server: Server) -> None:
    record = record_of(server)
    assert (record.name, record.kind, record.state) == ("local", "local", "running")
    assert (record.num_workers, record.num_slots) == (2, 4)
    assert record.address.startswith("tls://127.0.0.1:")
    assert "tls" not in record.public()
    assert "BEGIN" not in json.dumps(record.public())
    assert stat.S_IMODE((record.folder / "cluster.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(record.folder.stat().st_mode) == 0o700


def test_a_client_without_the_certificate_is_turned_away(server: Server) -> None:
    address = record_of(server).address
    for wrong in (address, address.replace("tls://", "tcp://")):
        with pytest.raises((OSError, RuntimeError, TypeError, ValueError)):
            server.do(_connect(wrong))


async def _connect(address: str) -> None:
    client = Client(address, asynchronous=True, timeout=2, set_as_default=False)
    try:
        await client
    finally:
        await client.close()


def test_nothing_listens_beyond_this_machine(server: Server) -> None:
    listening = [
        (process.pid, row.laddr.ip)
        for process in everybody(server)
        for row in process.net_connections("inet")
        if row.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1"}


def test_agents_and_host_are_out_of_reach_of_the_kernels_signals(server: Server) -> None:
    for pid in (record_of(server).pid, *map(agent_pid, server.agents())):
        assert os.getsid(pid) == pid


def test_a_name_is_taken_once(server: Server) -> None:
    with pytest.raises(NameTaken, match="'local'"):
        server.do(server.pool.start(name="local"))


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        ({"kind": "locl"}, UsageError, "'locl'.*local.*slurm"),
        ({"name": "a/b"}, UsageError, "not a valid name"),
        ({"workers": 0}, UsageError, "at least one worker"),
        ({"options": {"no_such": 1}}, UsageError, "no option no_such="),
        ({"options": {"slots": 0}}, UsageError, "at least 1"),
        ({"kind": "slurm"}, UsageError, "pip install dask-jobqueue"),
        ({"kind": "no.such:Thing"}, UsageError, "no"),
        ({"kind": "distributed:NoSuch"}, UsageError, "no NoSuch"),
    ],
)
def test_what_cannot_be_started_is_refused_and_leaves_nothing(
    server: Server, call: dict[str, Any], error: type[LLMCloudError], word: str
) -> None:
    before = sorted((config.runtime_dir() / "c").iterdir())
    with pytest.raises(error, match=word):
        server.do(server.pool.start(**{"name": "other", **call}))
    assert sorted((config.runtime_dir() / "c").iterdir()) == before
    assert [record.name for record in server.do(server.pool.list())] == ["local"]


def test_a_cluster_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(NotFound, match=r"'gone'.*local"):
        server.do(server.pool.stop("gone"))


def test_a_cluster_that_is_being_started_is_waited_for_and_takes_nothing_from_one_that_runs(server: Server) -> None:
    running = server.agents()
    slow = ClusterRecord(cluster_id="0", name="slow", kind="local", created=time.time(), owner_pid=os.getpid())
    server.pool._records["slow"] = slow
    try:
        assert [agent.address for agent in server.agents()] == [agent.address for agent in running]
        asked = server.begin(server.pool.agents("slow"))
        with pytest.raises(TimeoutError):
            asked.result(1)
    finally:
        del server.pool._records["slow"]  # as when its start has failed
    with pytest.raises(NotFound, match="slow"):
        asked.result(10)


def test_an_address_where_nobody_answers_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_client, "CONNECT_TIMEOUT_S", 1.0)
    with pytest.raises(ConnectionLost, match=r"127\.0\.0\.1:9"):
        server.do(server.pool.connect("tcp://127.0.0.1:9"))


# --- place ---


def test_ranks_are_placed_on_few_workers_first(server: Server) -> None:
    two = server.do(server.pool.place(None, 2))
    assert [allocation["num_ranks"] for allocation in two["agents"]] == [2]
    three = server.do(server.pool.place("local", 3))
    assert sorted(allocation["num_ranks"] for allocation in three["agents"]) == [1, 2]
    assert (three["num_ranks"], three["started"]) == (3, False)
    assert server.do(server.pool.place(None, None))["num_ranks"] == 2


def test_more_ranks_than_the_cluster_can_hold_are_refused(server: Server) -> None:
    with pytest.raises(CapacityError, match="-n 5: the cluster holds 4 ranks"):
        server.do(server.pool.place(None, 5))


def test_a_world_spans_two_workers_and_holds_its_slots(server: Server) -> None:
    world = server.world(3)
    assert world.ok(SUM).results() == ["3", "3", "3"]
    assert sorted(agent.free_slots for agent in server.agents()) == [0, 1]
    with pytest.raises(Busy, match="1 of 4"):
        server.do(server.pool.place(None, 2))
    world.end()
    until(lambda: sum(agent.free_slots for agent in server.agents()) == 4, "the slots are free again")


@pytest.mark.story
def test_whoever_waits_for_slots_gets_them_in_turn(server: Server) -> None:
    """Four owners who want three of four slots each, again and again: with luck for a rule one waits for 14 others."""
    contest = Contest(server, starts=16)
    contest.run()
    assert len(contest.lasted) == 16 and contest.num_refused > 0
    assert max(contest.before) <= OWNERS
    server.world(4).end()  # nothing is kept for anybody any more


CODE = "def load(): ...\ndef predict(inputs): return inputs\n"


def start_replica(server: Server, name: str) -> AgentInfo:
    """A replica of a cell's code, with a core of its own: as a server has the agent start it."""
    source = str(write_cell(CellSource(CODE)))
    _, agent = server.do(server.pool.agent_for_replica(None, ReplicaNeeds(cores=1), f"replica of {name}"))
    spec = {"endpoint": "e", "served_name": "e", "model": "", "source": source, "token": "t", "cores": 1, "devices": 0}
    server.do(_asked(agent, LaunchReplica(endpoint="e", replica_id=name, spec=spec)))
    return agent


async def _asked(agent: AgentInfo, message: Any) -> None:
    async with await AgentConnection.open(agent.address) as connection:
        await connection.request(message)


def placed(server: Server, num_ranks: int, ticket: str, priority: int) -> Any:
    """Where a world goes; None while it waits."""
    with contextlib.suppress(Busy):
        return server.do(server.pool.place(None, num_ranks, ticket, priority=priority))
    return None


def test_a_world_of_higher_priority_gets_the_slots_of_an_autoscaled_endpoint(server: Server) -> None:
    at = {name: start_replica(server, name) for name in ("one", "two")}
    told: list[Shortage] = []
    ending: list[asyncio.Future[None]] = []

    def on_shortage(shortage: Shortage) -> None:
        """As the server does for an endpoint of priority 0 that has between one and two replicas."""
        told.append(shortage)
        held = sum(shortage.held.get(name, 0) for name in at)
        lender = Lender("e", priority=0, num_replicas=len(at), min_replicas=1, slots_each=1, held=held)
        while len(at) > give_way(shortage, [lender]).get("e", len(at)):
            name, agent = at.popitem()
            ending.append(asyncio.ensure_future(_asked(agent, EndReplica(replica_id=name))))

    server.pool.on_shortage = on_shortage
    try:
        with pytest.raises(Busy, match="2 of 4"):
            server.do(server.pool.place(None, 3, "equal", priority=0))
        assert len(at) == 2  # of equal priority: who is there first stays
        with pytest.raises(Busy, match="2 of 4"):
            server.do(server.pool.place(None, 3, "urgent", priority=1))
        assert [(row.missing, row.priority, row.held) for row in told] == [
            (1, 0, {"one": 1, "two": 1}),
            (1, 1, {"one": 1, "two": 1}),
        ]
        until(lambda: sum(agent.free_slots for agent in server.agents()) == 3, "a replica has ended")
        placement = until(lambda: placed(server, 3, "urgent", priority=1), "it is its turn")
        world = Ranks(AgentElsewhere(placement["agents"][0]["address"]), 3, agents=placement["agents"])
        assert world.ok(SUM).results() == ["3", "3", "3"]
        world.end()
    finally:
        server.pool.on_shortage = lambda _: None
        for name, agent in at.items():
            server.do(_asked(agent, EndReplica(replica_id=name)))
    until(lambda: sum(agent.free_slots for agent in server.agents()) == 4, "the slots are free again")
    until(lambda: _world_of_all(server), "nothing is kept for anybody any more", 60).end()


def _world_of_all(server: Server) -> Ranks | None:
    with contextlib.suppress(Busy):
        return server.world(4)
    return None


# --- workers die, servers change ---


def test_a_killed_worker_leaves_its_ranks_training_and_the_next_one_adopts_them(server: Server, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    before = {agent.name: agent_pid(agent) for agent in server.agents()}
    world = server.world(3)
    running = world.send(WORKS_UNTIL.format(flag=str(flag))).wait_for("in it", times=3)
    workers = _worker_pids(record_of(server))
    assert len(workers) == 2
    for pid in workers:
        psutil.Process(pid).kill()
    until(lambda: len(set(_worker_pids(record_of(server))) - set(workers)) == 2, "there are new workers", 30)
    until(lambda: len(server.agents()) == 2, "the new workers have agents", 30)
    assert {agent.name: agent_pid(agent) for agent in server.agents()} == before
    flag.touch()
    outcome = running.end()
    assert outcome.state == "finished"
    for rank in range(3):
        steps = outcome.values("step", rank)
        assert steps == [float(number) for number in range(1, len(steps) + 1)]
    world.end()


def _worker_pids(record: ClusterRecord) -> list[int]:
    """Processes that the nannies of the cluster's host have spawned."""
    found = []
    for child in psutil.Process(record.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def test_who_asks_while_a_worker_dies_is_answered_at_once(server: Server) -> None:
    """Dask's scheduler goes on for a minute trying to reach a worker of whose end it has not heard when it is asked."""
    host, worker = psutil.Process(record_of(server).pid), psutil.Process(_worker_pids(record_of(server))[0])
    host.suspend()
    worker.kill()
    asking = [server.begin(server.pool.agents()) for _ in range(4)]
    with pytest.raises(TimeoutError):
        asking[0].result(0.2)
    host.resume()
    began = time.monotonic()
    for each in asking:
        assert each.result(60)
    assert time.monotonic() - began < 10
    until(lambda: len(server.agents()) == 2, "there is a new worker with the agent", 30)


def test_another_server_finds_the_cluster_that_outlived_the_first(own_server: Callable[..., Server]) -> None:
    with subprocess.Popen(["sleep", "600"]) as owner:
        first = own_server(owner_pid=owner.pid, lease_s=30.0)
        first.do(first.pool.start(workers=1, options={"slots": 2}))
        [agent] = map(agent_pid, first.agents())
        first.leave()
        owner.kill()
    second = own_server()
    second.do(second.pool.restore())
    assert record_of(second).num_slots == 2
    assert [*map(agent_pid, second.agents())] == [agent]
    pids = [process.pid for process in everybody(second)]
    second.do(second.pool.stop("local"))
    until(lambda: not any(map(alive, pids)), "everything has ended", 10)
    assert list((config.runtime_dir() / "c").iterdir()) == []


@pytest.mark.story
def test_a_cluster_without_its_owner_ends_with_its_lease(own_server: Callable[..., Server]) -> None:
    with subprocess.Popen(["sleep", "600"]) as owner:
        server = own_server(owner_pid=owner.pid, lease_s=0.5)
        server.do(server.pool.start(workers=1, options={"slots": 2}))
        pids = [process.pid for process in everybody(server)]
        server.leave()
        owner.kill()
    until(lambda: not any(map(alive, pids)), "host, workers and agents have ended", 20)
    assert list((config.runtime_dir() / "c").iterdir()) == []


@pytest.mark.story
@pytest.mark.usefixtures("not_preloaded")
def test_a_killed_host_leaves_a_run_training_and_then_the_agents_end(
    own_server: Callable[..., Server], tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    server = own_server(lease_s=0.5)
    server.do(server.pool.start(workers=1, options={"slots": 2}))
    world = server.world(2)
    running = world.send(WORKS_UNTIL.format(flag=str(flag))).wait_for("in it", times=2)
    record, [agent] = record_of(server), server.agents()
    pid = agent_pid(agent)
    server.leave()
    host = psutil.Process(record.pid)
    workers = [process.pid for process in host.children(recursive=True) if process.pid != pid]
    host.kill()
    until(lambda: not any(map(alive, workers)), "its workers follow it", 30)
    flag.touch()
    assert running.end().state == "finished"
    world.end()
    until(lambda: not alive(pid), "the agent ends with its lease", 20)


def test_scaling_ends_agents_and_starts_new_ones(server: Server) -> None:
    pids = {*map(agent_pid, server.agents())}
    assert server.do(server.pool.scale("local", 1)).num_workers == 1
    [left] = map(agent_pid, server.agents())
    assert left in pids
    until(lambda: not any(map(alive, pids - {left})), "the other agent has ended", 10)
    record = server.do(server.pool.scale("local", 2))
    assert (record.num_workers, record.num_slots) == (2, 4)
    assert left in map(agent_pid, server.agents())


@pytest.mark.story
def test_a_cluster_scaled_to_nothing_says_so(server: Server) -> None:
    server.do(server.pool.scale("local", 0))
    with pytest.raises(CapacityError, match="no workers"):
        server.do(server.pool.place(None, None))
    assert server.do(server.pool.scale("local", 2)).num_slots == 4


def test_a_replica_beside_a_reached_agent_needs_no_bridge_before_it_has_bound_its_socket(own_root: Path) -> None:
    pool = ClusterPool(os.getpid(), 2.0)
    agent = AgentInfo("a", "/a.sock", "here", 2, 2, False, 0, [], {}, [], "tcp://w", 2, 0, 1 << 30, 0, "/a.sock")
    assert asyncio.run(pool.reach_replica(None, agent, "/not-bound-yet.sock")) == "/not-bound-yet.sock"
