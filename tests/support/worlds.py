"""A real node agent with real ranks, for tests: cells in, outcomes out. A plugin of pytest (see conftest)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from jupyter_llmcloud.core.run.lifecycle import Ladder
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.protocol.agent_messages import (
    DescribeWorld,
    Execute,
    Journaled,
    Pull,
    Push,
    RankState,
    RenewLease,
    RunEnded,
    Shutdown,
    StartWorld,
    StopRun,
    StopWorld,
)
from jupyter_llmcloud.protocol.client import AgentChannel
from jupyter_llmcloud.protocol.rpc import Refused, restored
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

DEADLINE_S = 60.0
ORDINARY = "LLMCLOUD_TEST_ORDINARY"  # in an agent's environment: its zygote is started as a user's is
HASH_SEED = "6640"  # Dask's nannies hand it down: agents of tests are like those of clusters
NUM_SLOTS = 64  # of the agents of the session: room for many worlds whose cells wait at the same time
_numbers = itertools.count(1)


def until(condition: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """The first true value of `condition`; fails the test, saying what was waited for, when the deadline passes."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def family(pid: int) -> list[int]:
    """A process and everything below it."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def numbered_lines(shown: str) -> dict[int, list[int]]:
    """What each rank was shown to have written of `line 0`, `line 1`, ..., folded (`[0-1] line 7`) or not."""
    found: dict[int, list[int]] = {}
    for first, last, number in re.findall(r"^\[(\d+)(?:-(\d+))?\] line (\d+)$", shown, re.MULTILINE):
        for rank in range(int(first), int(last or first) + 1):
            found.setdefault(rank, []).append(int(number))
    return found


@dataclass
class Outcome:
    """How a cell ended and everything that was heard of it."""

    ended: RunEnded
    folder: RunFolder
    seconds: float
    logs: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    metrics: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    states: list[RankState] = field(default_factory=list)

    @property
    def state(self) -> str:
        return self.ended.state

    @property
    def error(self) -> dict[str, Any]:
        """The culprit's."""
        return self.ended.errors[0]

    @property
    def report(self) -> str:
        return "\n".join(self.ended.report)

    @property
    def record(self) -> RunRecord:
        return self.folder.read()

    def text(self, rank: int | None = None, kind: str = "stdout") -> str:
        """What a rank (or all) wrote."""
        return "".join(r["text"] for n, r in self.logs if r["kind"] == kind and rank in (None, n))

    def shown(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        """The mime bundles that a rank displayed, or that were results."""
        return [r["data"] for n, r in self.logs if r["kind"] == kind and n == rank]

    def results(self) -> list[str]:
        """The last expressions as text, by rank."""
        found = {n: r["data"]["text/plain"] for n, r in self.logs if r["kind"] == "result"}
        return [found[rank] for rank in sorted(found)]

    def values(self, name: str, rank: int = 0) -> list[Any]:
        """What was logged under a name."""
        rows = [r["values"] for n, r in self.metrics if n == rank and "values" in r]
        return [row[name] for row in rows if name in row]


class AgentProcess:
    """`python -m jupyter_llmcloud.agent` in a folder of its own, held like a Dask worker holds it.

    Without `slots` it has one for each GPU that it sees.
    """

    def __init__(
        self,
        slots: int | None = 8,
        *,
        held: bool = True,
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="a", dir=Path(os.environ["LLMCLOUD_ROOT"]).parent))
        command = [sys.executable, "-m", "jupyter_llmcloud.agent", "--folder", str(self.folder), "--name", "w0"]
        self.log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [*prefix, *command, *(["--slots", str(slots)] if slots else [])],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env={**os.environ, "PYTHONHASHSEED": HASH_SEED, **(env or {})},
            start_new_session=True,
        )
        announced = self.folder / "agent.json"
        until(lambda: announced.exists() or self.process.poll() is not None, "the agent announces itself")
        assert self.process.poll() is None, (self.folder / "log").read_text()
        self.address = str(json.loads(announced.read_text())["address"])
        self._lease = self.channel()
        if held:
            self._lease.request(RenewLease())

    def channel(self) -> AgentChannel:
        return AgentChannel(self.address)

    def let_go(self) -> None:
        """The worker has gone."""
        self._lease.close()

    def words(self) -> str:
        """What the agent itself printed: nothing, when all is well."""
        return (self.folder / "log").read_text(errors="replace")

    def end_by_force(self) -> None:
        """SIGKILL, as a host that is lost."""
        self.process.kill()
        self.process.wait()
        self.end()

    def end(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(Exception), contextlib.closing(self.channel()) as channel:
                channel.request(Shutdown(), 5)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._lease.close()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class AgentElsewhere:
    """An agent that a cluster has started."""

    address: str

    def channel(self) -> AgentChannel:
        return AgentChannel(self.address)


class Running:
    """A cell that was sent: follow it, stop it."""

    def __init__(self, ranks: Ranks, cell: Execute, number: int) -> None:
        self.ranks = ranks
        self.run_id = cell.run_id
        self.number = number
        self.began = time.monotonic()
        self.outcome = Outcome(RunEnded(run_id=cell.run_id, state="running"), RunFolder(Path(cell.folder)), 0.0)
        self.stopped_at = 0.0

    def wait_for(self, text: str, times: int = 1, timeout_s: float = DEADLINE_S) -> Running:
        """Until the ranks have written `text` so many times."""
        deadline = time.monotonic() + timeout_s
        while self.outcome.text().count(text) < times:
            if self._take(deadline, f"the ranks write {text!r}"):
                pytest.fail(f"the cell ended before its ranks wrote {text!r}: {self.outcome}")
        return self

    def wait_for_state(self, state: str, timeout_s: float = DEADLINE_S) -> RankState:
        """Until a rank (or, as -1, the whole run) is said to be in a state."""
        deadline = time.monotonic() + timeout_s
        while not (found := [row for row in self.outcome.states if row.state == state]):
            if self._take(deadline, f"a rank is {state}"):
                pytest.fail(f"the cell ended before it was {state}: {self.outcome}")
        return found[0]

    def stop(self, presses: int = 1) -> Running:
        """Press Stop."""
        self.stopped_at = self.stopped_at or time.monotonic()
        with contextlib.closing(self.ranks.agent.channel()) as other:
            other.request(StopRun(run_id=self.run_id))
            with contextlib.suppress(NotFound):  # ended by an earlier press
                for _ in range(presses - 1):
                    time.sleep(Ladder().again_s)  # sooner they would be the same press
                    other.request(StopRun(run_id=self.run_id))
        return self

    def end(self, timeout_s: float = DEADLINE_S) -> Outcome:
        """Until it has ended."""
        deadline = time.monotonic() + timeout_s
        while not self._take(deadline, "the cell ends"):
            pass
        self.outcome.seconds = time.monotonic() - (self.stopped_at or self.began)
        return self.outcome

    def _take(self, deadline: float, what: str) -> bool:
        message = self.ranks.channel.receive(max(0.0, deadline - time.monotonic()))
        match message:
            case None:
                pytest.fail(f"waited in vain until {what}; heard so far: {self.outcome}")
            case Journaled(run_id=self.run_id):
                rows = self.outcome.logs if message.journal == "logs" else self.outcome.metrics
                rows += [(message.rank, record) for record in message.records]
            case RankState(run_id=self.run_id):
                self.outcome.states.append(message)
            case RunEnded(run_id=self.run_id):
                self.outcome.ended = message
                return True
            case Refused(reply_to=self.number):
                raise restored(message)
        return False


class Ranks:
    """A world and a connection that owns it."""

    def __init__(
        self,
        agent: AgentProcess | AgentElsewhere,
        size: int = 2,
        shares: Sequence[tuple[AgentProcess | AgentElsewhere, int]] = (),
        **spec: Any,
    ) -> None:
        self.agent = agent
        self.size = size
        self.world_id = str(spec.get("world_id") or f"w{next(_numbers)}")
        self.channel = agent.channel()
        places = [{"address": a.address, "num_ranks": n} for a, n in shares or [(agent, size)]]
        self.channel.request(StartWorld(**{"world_id": self.world_id, "agents": places, **spec}), DEADLINE_S)

    def send(self, code: str, magic: str = "%%distribute", **options: Any) -> Running:
        """Send a cell and return at once."""
        number = next(_numbers)
        body = textwrap.dedent(code).lstrip("\n")
        run_id = options.setdefault("run_id", f"run-{number}")
        cell = Execute(
            world_id=self.world_id,
            code=body,
            **{
                "name": "cell",
                "source": f"{magic}\n{body}",
                "line_offset": 1,
                "filename": f"/tmp/cell-{number}.py",
                "execution_count": number,
                "folder": str(Path(os.environ["LLMCLOUD_ROOT"]) / "runs" / run_id),
                **options,
            },
        )
        return Running(self, cell, self.channel.send(cell))

    def run(self, code: str, **options: Any) -> Outcome:
        """Send a cell and wait for its end."""
        return self.send(code, **options).end()

    def beside(self, agent: AgentProcess | AgentElsewhere | None = None) -> Ranks:
        """The same world over another connection, as another notebook would see it, or as another agent leads it."""
        other = object.__new__(Ranks)
        agent = agent or self.agent
        other.__dict__.update(self.__dict__, agent=agent, channel=agent.channel())
        return other

    def ok(self, code: str, **options: Any) -> Outcome:
        """A cell that must finish."""
        outcome = self.run(code, **options)
        assert outcome.state == "finished", "\n".join([outcome.report, *outcome.error["traceback"]])
        return outcome

    def push(self, ranks: Sequence[int] = (), **values: Any) -> None:
        self.channel.request(Push(world_id=self.world_id, ranks=list(ranks), payload=cloudpickle.dumps(values)))

    def pull(self, name: str, rank: int = 0) -> Any:
        pulled = self.channel.request(Pull(world_id=self.world_id, names=[name], rank=rank))
        return cloudpickle.loads(pulled.payload)[name]

    def describe(self) -> dict[str, Any]:
        return self.channel.request(DescribeWorld(world_id=self.world_id)).as_dict()

    def pids(self) -> list[int]:
        return [row["pid"] for row in self.describe()["ranks"]]

    def end(self) -> None:
        with contextlib.suppress(Exception):
            self.channel.request(StopWorld(world_id=self.world_id), 5)
        self.channel.close()


def _quiet_agent() -> Iterator[AgentProcess]:
    process = AgentProcess(NUM_SLOTS)
    yield process
    words = process.words()
    process.end()
    assert "Traceback" not in words, words


@pytest.fixture(scope="session")
def node_agent() -> Iterator[AgentProcess]:
    """An agent for the whole session: its imports take seconds, a world on it a tenth of one."""
    yield from _quiet_agent()


@pytest.fixture(scope="session")
def follower() -> Iterator[AgentProcess]:
    """A second agent for the session, for worlds over two."""
    yield from _quiet_agent()


@pytest.fixture(scope="module")
def world(node_agent: AgentProcess) -> Iterator[Ranks]:
    """Two ranks, shared by the tests of a module."""
    ranks = Ranks(node_agent)
    yield ranks
    ranks.end()


@pytest.fixture
def new_world(node_agent: AgentProcess) -> Iterator[Callable[..., Ranks]]:
    """Makes worlds that end with the test."""
    worlds: list[Ranks] = []

    def make(size: int = 2, **spec: Any) -> Ranks:
        worlds.append(Ranks(node_agent, size, **spec))
        return worlds[-1]

    yield make
    for ranks in worlds:
        ranks.end()


@pytest.fixture
def own_agent() -> Iterator[Callable[..., AgentProcess]]:
    """Makes agents that may be killed."""
    agents: list[AgentProcess] = []

    def make(**options: Any) -> AgentProcess:
        agents.append(AgentProcess(**options))
        return agents[-1]

    yield make
    for agent in agents:
        agent.end()
