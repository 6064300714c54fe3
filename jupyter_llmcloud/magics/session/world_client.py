"""The world of this notebook: where its cells are executed."""

from __future__ import annotations

import builtins
import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cloudpickle

from jupyter_llmcloud import config
from jupyter_llmcloud.client.stop_signal import StopSignal, said
from jupyter_llmcloud.core.export.literals import literal
from jupyter_llmcloud.core.run.stacks import fold_stacks
from jupyter_llmcloud.errors import (
    ConnectionLost,
    LLMCloudError,
    NotFound,
    ProtocolError,
    RankError,
    UsageError,
    WorldError,
)
from jupyter_llmcloud.magics.output.run_view import RunDisplay
from jupyter_llmcloud.magics.session.kernel_end import KernelShutdown, kernel_end
from jupyter_llmcloud.magics.session.reconnect import Reconnection
from jupyter_llmcloud.protocol.agent_messages import (
    DescribeWorld,
    DumpStacks,
    Execute,
    Journaled,
    ListVariables,
    Names,
    Pull,
    Push,
    RankState,
    ReleaseWorld,
    ResizeWorld,
    RunEnded,
    StartWorld,
    StopRun,
    StopWorld,
    TimesTold,
    WorldDescription,
)
from jupyter_llmcloud.protocol.client import AgentChannel
from jupyter_llmcloud.protocol.frames import Message, Unreadable, replace
from jupyter_llmcloud.protocol.payload_size import dump_variables
from jupyter_llmcloud.protocol.rpc import R, Refused, Request, restored

if TYPE_CHECKING:
    from jupyter_llmcloud.magics.session.leader_lookup import LeaderLookup
    from jupyter_llmcloud.widgets.live_view import LiveView

# Functions that were defined on a rank call this round their loops, wherever they are pulled to.
vars(builtins).setdefault("__llmcloud_loop__", lambda iterable, number: iterable)
vars(builtins).setdefault("__llmcloud_while__", lambda number, first, last: None)

WORLD_LEASE_S = 900.0
START_TIMEOUT_S = 300.0
RELEASE_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 600.0
VARIABLES_TIMEOUT_S = 15.0
SAID_AFTER_S = 0.7  # a request that has waited so long for its turn says for what


@dataclass(frozen=True)
class RunResult:
    """How a run ended in the foreground. `pulled` holds the variables that --pull named."""

    run_id: str
    state: str
    report: list[str] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    pulled: dict[str, Any] = field(default_factory=dict)


class WorldClient:
    """A handle of the kernel: `start` makes one, `stop` ends its ranks."""

    def __init__(
        self, channel: AgentChannel, world_id: str, cluster: str, world_size: int, leaders: LeaderLookup | None = None
    ) -> None:
        self.address = channel.address  # of the leading agent
        self._channels = threading.local()  # two threads that read from one would take each other's answers
        self.channel = channel
        self.world_id = world_id
        self.cluster = cluster
        self.world_size = world_size
        self.heard_at = 0.0  # on the monotonic clock
        self.last_error: RankError | None = None
        self.leaders = leaders

    @classmethod
    def start(cls, placement: dict[str, Any], owner: str, leaders: LeaderLookup | None = None) -> WorldClient:
        """Start ranks where the server has placed them."""
        channel = AgentChannel(placement["agents"][0]["address"])
        world_id = placement.get("world_id") or secrets.token_hex(6)
        try:
            lease_s = config.lease_s(WORLD_LEASE_S)
            request = StartWorld(
                world_id=world_id, agents=placement["agents"], owner=owner, cwd=working_folder(), lease_s=lease_s
            )
            channel.request(request, START_TIMEOUT_S)
        except BaseException:
            channel.close()
            raise
        return cls(channel, world_id, placement["cluster"], placement["num_ranks"], leaders)

    @property
    def channel(self) -> AgentChannel:
        """The connection of this thread."""
        known: AgentChannel | None = getattr(self._channels, "own", None)
        if known is None:
            known = self._channels.own = AgentChannel(self.address)
        return known

    @channel.setter
    def channel(self, channel: AgentChannel) -> None:
        self._channels.own = channel

    def find_again(self) -> bool:
        """After its leading agent was lost: whether a run has taken it along to another one."""
        address = self.leaders.of_world(self.world_id) if self.leaders is not None else ""
        if not address:
            return False
        self.channel.close()
        self.address, self.channel = address, AgentChannel(address)
        self.world_size = self.describe().world_size
        return True

    def describe(self) -> WorldDescription:
        """Ranks with pid, host, memory and what each is doing."""
        return self._ask(DescribeWorld(world_id=self.world_id))

    def _ask(self, request: Request[R], timeout_s: float = 60.0, waits_on: Callable[[], bool] = lambda: False) -> R:
        """Ask what may be asked twice: over another connection when this one has broken."""
        try:
            return self.channel.request(request, timeout_s, waits_on)
        except ConnectionLost:
            self._reopen()
            return self.channel.request(request, timeout_s, waits_on)

    def _ask_in_turn(self, request: Request[R], what: str) -> R:
        """Ask for something of the ranks, which a run in the background may use now: then say so and wait for it."""
        return self._ask(request, SAID_AFTER_S, self._waits_for_run(what, ANSWER_TIMEOUT_S))

    def _waits_for_run(self, what: str, patience_s: float) -> Callable[[], bool]:
        """Whether to wait on for an answer: as long as a run has the ranks, and then for so long without one."""
        said: set[str] = set()
        free_since = time.monotonic()

        def waits_on() -> bool:
            nonlocal free_since
            run_id = self.beside().run_id
            if run_id:
                free_since = time.monotonic()
            if run_id and run_id not in said:
                said.add(run_id)
                print(
                    f"{what} waits until the run {run_id} has ended, which uses the ranks now. "
                    f"%runs stop {run_id} ends it; Stop here gives up waiting.",
                    flush=True,
                )
            return time.monotonic() - free_since < patience_s

        return waits_on

    def beside(self) -> WorldDescription:
        """The world now, asked over a connection of its own: another one may be waiting for its answer."""
        channel = AgentChannel(self.address)
        try:
            return channel.request(DescribeWorld(world_id=self.world_id))
        finally:
            channel.close()

    def _reopen_if_closed(self) -> None:
        if self.channel.closed:  # by a Stop in the middle of a message
            self._reopen()

    def _reopen(self) -> None:
        self.channel.close()
        self.channel = AgentChannel(self.address)
        self.channel.request(DescribeWorld(world_id=self.world_id))  # whose connection owns the world

    def resize(self, num_ranks: int, placement: dict[str, Any] | None = None) -> list[str]:
        """Have `num_ranks` ranks; more go where the server has placed them. Says what those that are new lack."""
        agents = placement["agents"] if placement else []
        request = ResizeWorld(world_id=self.world_id, num_ranks=num_ranks, agents=agents)
        self._reopen_if_closed()
        waits_on = self._waits_for_run("%world resize", START_TIMEOUT_S)
        resized = self.channel.request(request, SAID_AFTER_S, waits_on)
        self.world_size = resized.world_size
        return resized.notes

    def stacks(self) -> list[str]:
        """What every rank is doing now, as lines; what is equal is said once. Works while a run goes on."""
        channel = AgentChannel(self.address)  # the world's own belongs to the thread that follows a run
        try:
            stacks = channel.request(DumpStacks(world_id=self.world_id))
        finally:
            channel.close()
        return fold_stacks(stacks.ranks, stacks.cells)

    def release(self, grace_s: float) -> None:
        """Say that this notebook ends: the world does so after its last run, unless it is found again in time."""
        channel = AgentChannel(self.address, RELEASE_TIMEOUT_S)  # its own: another thread may follow a run
        try:
            channel.request(ReleaseWorld(world_id=self.world_id, grace_s=grace_s), RELEASE_TIMEOUT_S)
        finally:
            channel.close()

    def stop(self) -> None:
        """End every rank; its variables are gone."""
        try:
            self._ask(StopWorld(world_id=self.world_id))
        finally:
            self.channel.close()

    # --- variables ---

    def push(self, values: dict[str, Any], ranks: Sequence[int] = ()) -> None:
        """Set variables on ranks (all when empty)."""
        texts = {name: "" if ranks else literal(value) for name, value in values.items()}
        request = Push(world_id=self.world_id, ranks=list(ranks), texts=texts, payload=pickled(values, "%push"))
        self._ask_in_turn(request, "%push")

    def pull(self, names: Sequence[str], rank: int = 0) -> dict[str, Any]:
        """Variables of one rank."""
        pulled = self._ask_in_turn(Pull(world_id=self.world_id, names=list(names), rank=rank), "%pull")
        values: dict[str, Any] = cloudpickle.loads(pulled.payload)
        return values

    def missing(self, names: Sequence[str], rank: int = 0) -> list[str]:
        """Which of these a rank does not have."""
        return self._ask_in_turn(Names(world_id=self.world_id, names=list(names), rank=rank), "The cell").missing

    def own_names(self, timeout_s: float) -> list[str]:
        """The user's variables on rank 0. Raises ConnectionLost when a run has the ranks for longer than that."""
        channel = AgentChannel(self.address, timeout_s)
        try:
            return channel.request(Names(world_id=self.world_id, names=[]), timeout_s).own
        finally:
            channel.close()

    def variables(self) -> list[dict[str, Any]]:
        """The user's variables of the first rank, as rows of RankVariables; also while a run goes on."""
        channel = AgentChannel(self.address)
        try:
            told = channel.request(ListVariables(world_id=self.world_id), VARIABLES_TIMEOUT_S)
        finally:
            channel.close()
        return list(told.ranks[min(told.ranks)].get("variables", ())) if told.ranks else []

    # --- cells ---

    def submit(self, cell: Execute) -> None:
        """Execute in the background."""
        self._reopen_if_closed()
        self.channel.request(cell)

    def execute(self, cell: Execute, ranks: Sequence[int], live: LiveView | None = None) -> RunResult:
        """Execute and show; returns when every rank has ended. Raises RankError, KeyboardInterrupt after a Stop.

        `live` is the view of the run, where it has been in the cell since before there were ranks.
        """
        with StopSignal(kernel_end.explains_press) as stop:
            try:
                self.channel.send(cell)
            except ConnectionLost:  # while nothing was done: half a message is no message
                self._reopen()
                self.channel.send(cell)
            view = RunDisplay(
                cell.run_id, cell.name, ranks, stop=lambda: self._stop_from_elsewhere(cell.run_id), live=live
            )
            try:
                ended = self._follow(cell, view, stop)
            except KernelShutdown:
                message = f"{kernel_end.message} The run goes on: %runs attach {cell.run_id} shows all of it."
                view.finish("running", report=[message])
                raise said(message) from None
        return self._result(ended, stop.presses > 0)

    def _stop_from_elsewhere(self, run_id: str) -> None:
        # The channel belongs to the thread that follows the run; a button may press from another.
        channel = AgentChannel(self.address)
        try:
            channel.request(StopRun(run_id=run_id))
        finally:
            channel.close()

    def _follow(self, cell: Execute, view: RunDisplay, stop: StopSignal) -> RunEnded:
        ended: RunEnded | None = None
        while ended is None:
            try:
                ended = self._hear(cell.run_id, view, stop)
                self.heard_at = time.monotonic()
            except ConnectionLost:
                self.heard_at = 0.0
                ended = self._regain(cell, view, stop)
        view.finish(ended.state, ended.errors, ended.report)
        if cell.elastic:
            with contextlib.suppress(LLMCloudError):
                self.world_size = self.describe().world_size
        return ended

    def _hear(self, run_id: str, view: RunDisplay, stop: StopSignal) -> RunEnded:
        channel = self.channel
        while True:
            message = channel.receive(0 if channel.has_more else view.next_tick_s(), wake_fd=stop.fd)
            if stop.is_leaving:
                raise KernelShutdown
            if stop.presses > stop.passed_on:
                stop.drain()
                for _ in range(stop.presses - stop.passed_on):
                    stop.requests.add(channel.send(StopRun(run_id=run_id)))
                    stop.passed_on += 1
                view.stopping()
            ended = self._take(message, run_id, view, stop)
            if ended is not None or not channel.has_more:
                view.tick()
            if ended is not None:
                return ended

    def _regain(self, cell: Execute, view: RunDisplay, stop: StopSignal) -> RunEnded | None:
        """The connection has broken: another one, or how the run has ended."""
        self.channel.close()
        leaders = self.leaders if cell.max_restarts else None
        regaining = Reconnection(self.address, self.world_id, cell.run_id, view, stop, leaders)
        channel, ended = regaining.regain()
        self.address = regaining.address
        if channel is not None:
            self.channel = channel
        if ended is not None and ended.state == "finished" and cell.pull:
            first = cell.ranks[0] if cell.ranks else 0
            return replace(ended, payload=cloudpickle.dumps(self.pull(cell.pull, first)))
        return ended

    def _take(self, message: Message | None, run_id: str, view: RunDisplay, stop: StopSignal) -> RunEnded | None:
        match message:
            case Journaled(run_id=known) if known == run_id:
                view.records(message.journal, message.rank, message.records)
            case RankState(run_id=known, rank=-1, state="queued") if known == run_id:
                view.queued(message.detail)
            case RankState(run_id=known, rank=-1) if known == run_id:
                view.note(message.detail)
            case RankState(run_id=known) if known == run_id:
                view.rank_state(message.rank, message.state, message.detail)
            case TimesTold(run_id=known) if known == run_id:
                view.times(message.shares, message.seconds, message.price)
            case RunEnded(run_id=known) if known == run_id:
                view.times({}, message.seconds)
                return message
            case Refused(code=NotFound.code, reply_to=number) if number in stop.requests:
                pass  # pressed a moment after the run had ended, which was said before
            case Refused():
                raise restored(message)
            case Unreadable():
                raise ProtocolError(f"the node agent at {self.address} said {message.kind!r}, which {message.reason}.")
        return None

    def _result(self, ended: RunEnded, pressed: bool) -> RunResult:
        if ended.state == "failed" and ended.errors:
            first = ended.errors[0]
            same = [error["rank"] for error in ended.errors if error["evalue"] == first["evalue"]]
            self.last_error = RankError(
                first["rank"],
                first["ename"],
                first["evalue"],
                first["traceback"],
                ranks=same,
                report=ended.report,
                run_id=ended.run_id,
                place=first.get("place", ""),
                local_variables=first.get("locals"),
            )
            raise self.last_error
        if ended.state == "stopped":
            raise stopped(ended.run_id, ended.report)
        if ended.state == "lost":
            raise WorldError(f"run {ended.run_id} was lost: the agent that led it has gone. %runs shows what is left.")
        pulled = cloudpickle.loads(ended.payload) if ended.payload else {}
        return RunResult(ended.run_id, ended.state, ended.report, ended.artifacts, pulled)


def working_folder() -> str:
    """Where the notebook works; "" when that folder is no more."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def stopped(run_id: str, report: Sequence[str]) -> KeyboardInterrupt:
    """What a stopped run raises: Run All ends as after any Stop, and the cell says what was kept."""
    return said(f"run {run_id} was stopped", "KeyboardInterrupt: the run was stopped.", *report)


def pickled(values: dict[str, Any], what: str = "--push") -> bytes:
    """Pickle variables; raises UsageError naming the one that cannot be pickled, or those that are too large."""
    return dump_variables(values, _dump, what, str(config.root()), _cannot_push)


def _cannot_push(name: str, value: Any, error: Exception) -> UsageError:
    return UsageError(
        f"cannot push {name!r} ({type(value).__name__}): {type(error).__name__}: {error}. "
        "Push what it is made from, and make it on the ranks."
    )


def _dump(value: Any, file: Any) -> None:
    cloudpickle.Pickler(file).dump(value)
