"""What the tests of the server share: a node agent that starts stand-in replicas, clusters without Dask, a client."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpx

from jupyter_llmcloud.core.scheduling.holders import HeldWorld, find_world
from jupyter_llmcloud.errors import Busy, CapacityError, NotFound
from jupyter_llmcloud.protocol.agent_messages import (
    DescribeReplicas,
    EndReplica,
    LaunchReplica,
    ReplicaDescription,
    ReplicaList,
    StopRun,
    WorldStacks,
    WorldVariables,
)
from jupyter_llmcloud.protocol.connection import Connection
from jupyter_llmcloud.protocol.rpc import Responder
from jupyter_llmcloud.server.context import ServerContext
from tests.support.api_schema import check_answer
from tests.support.plain_http import PLAIN

STAND_IN = Path(__file__).parent / "stand_in_replica.py"
DEADLINE_S = 20.0
STOP_GRACE_S = 1.0


@dataclass
class StandInAgent:
    """A node agent as the server sees it: a unix socket that speaks the messages of `core`."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # why it has ended a replica
    stopped_runs: list[str] = field(default_factory=list)
    max_concurrent: int | None = None
    server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return str(self.folder / "a.sock")

    async def start(self) -> None:
        """Listen."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.server = await asyncio.start_unix_server(self._connected, self.address)

    async def close(self) -> None:
        """End every replica and the agent."""
        for process in self.processes.values():
            process.kill()
            process.wait()
            process.stdin.close()
        self.server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, responder = Connection(reader, writer, "the server"), self._make_responder()
        async for message in connection.messages():
            reply = await responder.answer(message)
            assert reply is not None
            connection.send(reply)
        connection.close()

    def _make_responder(self) -> Responder:
        responder = Responder("the stand-in of an agent")
        responder.on(LaunchReplica, self._start)
        responder.on(EndReplica, self._stop)
        responder.on(DescribeReplicas, lambda _: ReplicaList(replicas=[self._row(name) for name in self.processes]))
        responder.on(StopRun, lambda asked: self.stopped_runs.append(asked.run_id))
        return responder

    def _stop(self, asked: EndReplica) -> None:
        process = self.processes.get(asked.replica_id)
        if process is None:
            raise NotFound("no such replica")
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:  # it is frozen
            process.kill()
            process.wait()

    def _socket(self, name: str) -> str:
        return str(self.folder / f"{name[-8:]}.sock")

    def _row(self, name: str) -> dict[str, Any]:
        process = self.processes[name]
        code = process.poll()
        return {
            "replica_id": name,
            "endpoint": "",
            "pid": process.pid,
            "socket": self._socket(name),
            "state": "running" if code is None else "exited",
            "exit_code": code,
            "log": str(self.folder / f"{name}.log"),
            "reason": self.reasons.get(name, "") if code is not None else "",
        }

    def _start(self, message: LaunchReplica) -> ReplicaDescription:
        name = message.replica_id
        spec = {**message.spec, "socket": self._socket(name)}
        if self.max_concurrent is not None:
            spec["max_concurrent"] = self.max_concurrent
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, str(STAND_IN)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
        self.processes[name] = process
        return ReplicaDescription(**self._row(name))


@dataclass
class Cluster:
    """A cluster without Dask."""

    name: str
    kind: str = "local"
    num_workers: int = 1
    created: float = 1.0
    tls: str = "a private key"

    def public(self) -> dict[str, Any]:
        """What may be told."""
        return {"name": self.name, "kind": self.kind, "num_workers": self.num_workers, "created": self.created}


@dataclass
class AgentInfo:
    """What the server needs to know of an agent."""

    address: str


class StandInPool:
    """Clusters as the server uses them; every replica goes to one agent."""

    def __init__(self, agent: StandInAgent) -> None:
        self.agent = agent
        self.clusters: dict[str, Cluster] = {}
        self.bridges: Path | None = None
        self.free = 4
        self.no_room = ""
        self.never = ""  # what no host could ever hold
        self.closed = False

    async def list(self) -> list[Cluster]:
        return list(self.clusters.values())

    async def start(
        self, kind: str = "local", name: str | None = None, workers: int | None = None, options: Any = None
    ):
        from jupyter_llmcloud.errors import NameTaken

        name = name or kind
        if name in self.clusters:
            raise NameTaken(f"there is a cluster {name!r} already.")
        self.clusters[name] = Cluster(name, kind, workers or 1)
        return self.clusters[name]

    async def connect(self, address: str, name: str | None = None) -> Cluster:
        return await self.start("connected", name or "connected")

    async def scale(self, name: str, workers: int) -> Cluster:
        self._find(name).num_workers = workers
        return self.clusters[name]

    async def adapt(self, name: str, minimum: int, maximum: int) -> Cluster:
        return self._find(name)

    async def stop(self, name: str) -> str:
        self._find(name)
        del self.clusters[name]
        return name

    async def worlds(self, cluster: str | None = None) -> list[tuple[str, HeldWorld]]:
        return [("local", HeldWorld(world_id="abc123", owner="/home/me/project/a.ipynb", world_size=2, started=1.0))]

    async def stop_world(self, name: str) -> HeldWorld:
        [(_, world)] = await self.worlds()
        return find_world([world], name)

    async def world_stacks(self, name: str) -> Any:
        [(_, world)] = await self.worlds()
        return find_world([world], name).world_id, WorldStacks(ranks={}, cells={})

    async def world_variables(self, name: str) -> Any:
        [(_, world)] = await self.worlds()
        return find_world([world], name).world_id, WorldVariables(ranks={})

    async def place(
        self, cluster: str | None, num_ranks: int | None, ticket: str = "", replaces: str = "", priority: int = 0
    ) -> dict[str, Any]:
        if (num_ranks or 2) > 4:
            raise CapacityError(f"-n {num_ranks}: the cluster holds 4 ranks.")
        if (num_ranks or 2) > self.free:
            raise Busy(f"-n {num_ranks}: {self.free} of 4 slots are free.")
        found = {"cluster": "local", "agents": [], "num_ranks": num_ranks or 2, "started": False}
        return {**found, "world_id": "0123456789ab"}

    async def agent_for_replica(self, cluster: str | None, needs: Any = None, *_: Any) -> tuple[str, AgentInfo]:
        if self.never:
            raise CapacityError(self.never)
        if self.no_room:
            raise Busy(self.no_room)
        if cluster is not None:
            self._find(cluster)
        return cluster or "local", AgentInfo(self.agent.address)

    async def agents(self, name: str | None = None) -> list[AgentInfo]:
        return [AgentInfo(self.agent.address)]

    async def look(self, cluster: str | None = None) -> list[Any]:
        return []

    async def reach_replica(self, cluster: str | None, agent: AgentInfo, path: str) -> str:
        """The socket itself; in the way of a bridge when there is a folder for them."""
        if self.bridges is None:
            return path
        self.bridges.mkdir(exist_ok=True)
        bridge = self.bridges / Path(path).name
        if not bridge.is_symlink():
            bridge.symlink_to(path)
        return str(bridge)

    def _find(self, name: str) -> Cluster:
        if name not in self.clusters:
            raise NotFound(f"there is no cluster {name!r}.")
        return self.clusters[name]

    async def release(self) -> None:
        return

    async def close(self) -> None:
        self.closed = True


class Server:
    """A Jupyter server with our extension, in the loop of the test, and a client that is signed in."""

    def __init__(self, url: str, token: str, context: ServerContext, agent: StandInAgent, pool: StandInPool) -> None:
        self.url = url
        self.token = token
        self.context = context
        self.agent = agent
        self.pool = pool
        # It keeps no cookie: Jupyter signs in whoever comes with its token, and a later request shall not profit.
        jar = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        hooks = {"response": [check_answer]}
        self.client = httpx.AsyncClient(
            timeout=DEADLINE_S, trust_env=False, verify=PLAIN, cookies=jar, event_hooks=hooks
        )

    async def ask(
        self, method: str, path: str, body: Any = None, key: str | None = None, **options: Any
    ) -> httpx.Response:
        """A request with the Jupyter token, or with a scoped key."""
        credential = f"Bearer {key}" if key else f"token {self.token}"
        headers = {"Authorization": credential, **options.pop("headers", {})}
        return await self.client.request(method, f"{self.url}/{path}", json=body, headers=headers, **options)

    async def serve(self, folder: Path, name: str = "tiny", **options: Any) -> dict[str, Any]:
        """An endpoint that is ready."""
        answer = await self.ask("POST", "llmcloud/api/endpoints", {"target": str(folder), "name": name, **options})
        assert answer.status_code == 201, answer.text
        told = (await self.ask("GET", f"llmcloud/api/endpoints/{name}?wait_s=20")).json()
        assert told["state"] == "ready", told
        return told

    async def key(self, *scopes: str, **options: Any) -> str:
        """A new key."""
        wanted = list(scopes) or ["infer:tiny", "models:read"]
        answer = await self.ask("POST", "llmcloud/api/keys", {"scopes": wanted, **options})
        return answer.json()["key"]

    async def stats(self, name: str = "tiny") -> dict[str, Any]:
        """What the first replica of an endpoint counted."""
        replica = self.context.endpoints.get(name).ready_replicas()[0]
        async with replica.session.get("/stats") as response:
            return await response.json()

    async def complete(self, prompt: str, key: str | None = None, model: str = "tiny", **body: Any) -> httpx.Response:
        """A completion."""
        body = {"model": model, "prompt": prompt, **body}
        return await self.ask("POST", "llmcloud/v1/completions", body, key)


async def until(condition: Any, what: str) -> None:
    """Wait for a condition (a function, maybe async); fails after a deadline."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        assert asyncio.get_running_loop().time() < deadline, f"never came true: {what}"
        await asyncio.sleep(0.02)


def make_model(folder: Path, *marks: str) -> Path:
    """A folder that looks like a model; `marks` are files that tell a stand-in replica how to behave."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for mark in marks:
        (folder / mark).touch()
    return folder
