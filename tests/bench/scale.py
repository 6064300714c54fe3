"""Many hosts: the control traffic of many simulated agents against one real scheduler, server and leading agent.

`python -m tests.bench scale`; `LLMCLOUD_BENCH_AGENTS` says how many agents (1,000). They are real Dask workers with the real
plugin, in a few processes; only their ranks are simulated (see `bodies/simulated_agents.py`). What is told of each part is
its processor time, and how many messages of which kind there were.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.protocol.agent_messages import Execute, RunEnded, StartWorld, StopRun, StopWorld
from jupyter_llmcloud.protocol.client import AgentChannel
from tests.bench.measured import Row
from tests.support.worlds import until

NUM_AGENTS = int(os.environ.get("LLMCLOUD_BENCH_AGENTS", "1000"))
PER_PROCESS = 250
TRAINS_S = 30.0
WAIT_S = 900.0
_PYTHON = [sys.executable, "-P", "-m"]


def measure(folder: Path) -> list[Row]:
    """Registering, placing, starting a world, training and stopping, each with the processor time of every part."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        return Simulation(folder, stack).rows()


@contextmanager
def _process(*words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*_PYTHON, *words], text=True, stdin=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Simulation:
    """The processes, and what they have used so far."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._rows: list[Row] = []
        self._said: Counter[str] = Counter()
        self._parts: dict[str, list[psutil.Process]] = {}
        self._agents: list[subprocess.Popen[str]] = []
        self._stack = stack

    def rows(self) -> list[Row]:
        """All phases in turn."""
        scheduler = self._start_scheduler()
        server = self._start_server()
        address = self._start_leader()
        with self._phase("register with the scheduler"):
            self._start_agents(scheduler)
        with self._phase("connect: the plugin on each worker"):
            name = server.connect_cluster(scheduler)["name"]
        with self._phase("list the cluster once"):
            assert server.clusters()[0]["num_workers"] == NUM_AGENTS
        with self._phase("place a rank on each"):
            placed = server.place(name, NUM_AGENTS)
        channel = AgentChannel(address)
        with self._phase("start the world"):
            channel.request(StartWorld(world_id=placed["world_id"], agents=placed["agents"]), WAIT_S)
        cell = Execute(
            world_id=placed["world_id"], run_id="scale", name="scale", code="", source="", folder=self._run_folder()
        )
        channel.send(cell)
        with self._phase("train, a second", TRAINS_S):
            self._follow(channel, lambda _: False, TRAINS_S)
        with self._phase("stop the run"):
            channel.send(StopRun(run_id="scale"))
            self._follow(channel, lambda message: isinstance(message, RunEnded), WAIT_S)
        channel.request(StopWorld(world_id=placed["world_id"]), WAIT_S)
        channel.close()
        return self._rows

    @staticmethod
    def _run_folder() -> str:
        return str(config.root() / "runs" / "scale")

    @staticmethod
    def _follow(channel: AgentChannel, is_last: Callable[[object], bool], wait_s: float) -> None:
        """As a notebook does: read what the leader tells."""
        deadline = time.monotonic() + wait_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                if is_last(channel.receive(left)):
                    return
            except TimeoutError:
                return

    # --- processes ---

    def _log(self, name: str) -> IO[str]:
        return self._stack.enter_context((self._folder / f"{name}.log").open("w"))

    def _start_scheduler(self) -> str:
        told = self._folder / "scheduler.json"
        place = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)]
        words = ["distributed.cli.dask_scheduler", *place]
        process = self._stack.enter_context(_process(*words, stderr=self._log("scheduler")))
        self._parts["scheduler"] = [psutil.Process(process.pid)]
        found = until(lambda: told.exists() and told.read_text(), "the scheduler is there", 120)
        return str(json.loads(found)["address"])

    def _start_server(self) -> ServerClient:
        path = config.runtime_dir() / "headless-scale.json"
        path.unlink(missing_ok=True)
        words = ["jupyter_llmcloud.server.headless", "--owner-pid", str(os.getpid()), "--announce", str(path)]
        process = self._stack.enter_context(_process(*words, stderr=self._log("server")))
        self._parts["server"] = [psutil.Process(process.pid)]
        told = json.loads(until(lambda: path.exists() and path.read_text(), "the server is there", 120))
        client = ServerClient(told["url"], told["token"])
        self._stack.callback(client.close)
        return client

    def _start_leader(self) -> str:
        folder = self._folder / "leader"
        folder.mkdir()
        words = ["jupyter_llmcloud.agent", "--folder", str(folder), "--name", "leader", "--first-lease", str(WAIT_S)]
        process = self._stack.enter_context(_process(*words, stderr=self._log("leader")))
        self._parts["leading agent"] = [psutil.Process(process.pid)]
        told = folder / "agent.json"
        return str(json.loads(until(lambda: told.exists() and told.read_text(), "the leader is there", 120))["address"])

    def _start_agents(self, scheduler: str) -> None:
        for first in range(0, NUM_AGENTS, PER_PROCESS):
            number = min(PER_PROCESS, NUM_AGENTS - first)
            words = ["tests.bench.bodies.simulated_agents", scheduler, str(first), str(number)]
            words.append(str(self._folder / f"workers-{first}"))
            options = {"stdout": subprocess.PIPE, "stderr": self._log(f"agents-{first}")}
            self._agents.append(self._stack.enter_context(_process(*words, **options)))
        self._parts["simulated agents"] = [psutil.Process(process.pid) for process in self._agents]
        for process in self._agents:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"

    # --- figures ---

    def _used(self) -> dict[str, float]:
        return {
            part: sum(sum(process.cpu_times()[:2]) for process in processes) for part, processes in self._parts.items()
        }

    def _count(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for process in self._agents:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            total.update(json.loads(process.stdout.readline()))
        return total

    @contextmanager
    def _phase(self, what: str, per_s: float = 1.0) -> Iterator[None]:
        before, began = self._used(), time.monotonic()
        yield
        took = time.monotonic() - began
        for part, seconds in self._used().items():
            spent = (seconds - before.get(part, 0.0)) / per_s
            self._rows.append(Row("scale", f"{NUM_AGENTS} agents, {what}: {part}", "s of processor", "", [spent]))
        counts = self._count()
        new = {kind: number for kind, number in (counts - self._said).items() if kind != "asked"}
        self._said = counts
        told = ", ".join(f"{kind} {number / per_s:.0f}" for kind, number in sorted(new.items()))
        print(
            f"  {what}: {took:.1f} s by the clock (load {os.getloadavg()[0]:.1f}); {told}", file=sys.stderr, flush=True
        )
