"""A cell whose connection to its run broke: the run goes on, so the cell finds it and shows what it has missed."""

from __future__ import annotations

import contextlib
import select
import time
from typing import TYPE_CHECKING

from jupyter_llmcloud.client.stop_signal import StopSignal
from jupyter_llmcloud.errors import ConnectionLost, LLMCloudError, NotFound
from jupyter_llmcloud.magics.session.kernel_end import KernelShutdown
from jupyter_llmcloud.protocol.agent_messages import DescribeWorld, RunEnded, Subscribe
from jupyter_llmcloud.protocol.client import AgentChannel, is_ready
from jupyter_llmcloud.storage.journal import Cursor, read_from
from jupyter_llmcloud.storage.runs import ACTIVE_STATES, RunRecord, RunStore

if TYPE_CHECKING:
    from jupyter_llmcloud.magics.output.run_view import RunDisplay
    from jupyter_llmcloud.magics.session.leader_lookup import LeaderLookup

PATIENCE_S = 30.0
REFUSED_S = 2.0  # nobody listens any more: a bridge may be opening again, a node agent is not
STOPPED_S = 6.0  # after a Stop the prompt is back in any case
POLL_S = 0.2
ASK_S = 0.5  # how often the server is asked who leads a run with restarts


class Reconnection:
    """The search for one run.

    Args:
        leaders: for a run with restarts, which another agent may lead by now.

    Attributes:
        address: the socket of the agent that leads the run, as far as known.
    """

    def __init__(
        self, address: str, world_id: str, run_id: str, view: RunDisplay, stop: StopSignal, leaders: LeaderLookup | None
    ) -> None:
        self.address = address
        self._world_id = world_id
        self._run_id = run_id
        self._view = view
        self._stop = stop
        self._leaders = leaders
        self._lost_at = time.time()
        self._asked_at = -ASK_S
        self._refused = self._is_active = False

    def regain(self) -> tuple[AgentChannel | None, RunEnded | None]:
        """A connection that follows the run again, or how the run has ended meanwhile; all its output is in the view.

        Raises ConnectionLost when neither can be had in time.
        """
        began = time.monotonic()
        said = False
        while True:
            try:
                return self._follow(), None
            except (NotFound, ConnectionLost) as error:
                lost = error
            if self._stop.is_leaving:
                raise KernelShutdown
            if (ended := self._ended()) is not None:
                self._ask()
                return None, ended
            if self._goes_on() and not self._stop.presses:
                began = time.monotonic()  # the server says when it is lost
            limit_s = STOPPED_S if self._stop.presses else REFUSED_S if self._refused else PATIENCE_S
            if time.monotonic() - began > limit_s:
                raise ConnectionLost(f"{lost} If run {self._run_id} goes on, %runs attach {self._run_id} shows it.")
            if not said and time.time() - self._lost_at > 1.0:
                said = True
                print("The connection to the ranks is broken; looking for the run.", flush=True)
            is_ready([] if self._stop.presses else [self._stop.fd], select.POLLIN, POLL_S)

    def _follow(self) -> AgentChannel:
        self._refused = True
        channel = AgentChannel(self.address, 2.0)
        self._refused = False
        try:
            channel.request(DescribeWorld(world_id=self._world_id), 5.0)  # this notebook's, as before
            channel.request(Subscribe(run_id=self._run_id), 5.0)
        except BaseException:
            channel.close()
            raise
        self._show_missed()
        if (record := self._record()) is not None and record.state == "running":
            self._stop.passed_on = 0  # a Stop went down with the connection
        return channel

    def _goes_on(self) -> bool:
        """Whether the server says that a run with restarts has not ended; another agent may lead it."""
        if self._leaders is not None and time.monotonic() - self._asked_at > ASK_S:
            if self._stop.presses > self._stop.passed_on:
                self._stop.passed_on = self._stop.presses
                with contextlib.suppress(LLMCloudError):  # it has ended meanwhile, or the next round finds who leads it
                    self._leaders.stop(self._run_id)
            self._ask()
        return self._is_active

    def _ask(self) -> None:
        if self._leaders is not None:
            self._is_active = False
            with contextlib.suppress(LLMCloudError):  # the server is being started again, perhaps
                state, self.address = self._leaders.find(self._run_id)
                self._is_active = state in ACTIVE_STATES
            self._asked_at = time.monotonic()

    def _record(self) -> RunRecord | None:
        try:
            return RunStore().folder(self._run_id).read()
        except NotFound:
            return None

    def _ended(self) -> RunEnded | None:
        """How the run ended, from its folder; None when it has not, or is not there."""
        record = self._record()
        if record is None or record.is_active:
            return None
        self._show_missed()
        self._view.times({}, record.times)
        return RunEnded(run_id=self._run_id, state=record.state, errors=record.errors, artifacts=record.artifacts)

    def _show_missed(self) -> None:
        """Everything on disk, which the view shows once, and what was noted since."""
        folder = RunStore().folder(self._run_id)
        for kind in ("metrics", "logs"):
            for path in sorted((folder.path / kind).glob("rank-*.jsonl")):
                rank, cursor = int(path.stem.removeprefix("rank-")), Cursor()
                while records := read_from(path, cursor):
                    self._view.records(kind, rank, records)
        record = self._record()
        for entry in record.history if record is not None else ():
            if "why" in entry and entry["t"] >= self._lost_at:
                self._view.note(str(entry["why"]))
