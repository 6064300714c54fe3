"""A run from outside: the futures shape over its folder, so that it works from any kernel at any time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.client.stop_signal import StopSignal
from jupyter_llmcloud.core.output.numerals import format_duration
from jupyter_llmcloud.errors import LLMCloudError, NotFound, RankError, UsageError, WorldError
from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.run_journals import RunJournals
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore, Times
from jupyter_llmcloud.system.gil import short_switch_intervals

if TYPE_CHECKING:
    import pandas

POLL_S = 0.05
GONE_S = 1.0
ALIVE_S = 2.0  # how often the server is asked whether the agent of a run that goes on is there


class RunHandle:
    """A run by its id, in the shape of a future, with `logs()` and `metrics()`; can be awaited.

    Args:
        server: gives the server that knows whether the agent of the run is there.
    """

    def __init__(self, run_id: str, server: Callable[[], ServerClient]) -> None:
        self.run_id = run_id
        self.folder: RunFolder = RunStore().folder(run_id)
        self._server = server
        self._is_lost = False
        self._asked_at = time.monotonic()
        self._seen_at = time.monotonic() if self.folder.exists else None

    @property
    def record(self) -> RunRecord:
        """Its `run.json` as it is now; queued when it has not begun."""
        try:
            record = self.folder.read()
        except NotFound:
            return RunRecord(self.run_id, self.run_id, "deleted" if self._is_deleted else "queued")
        self._seen_at = time.monotonic()
        return record

    @property
    def _is_deleted(self) -> bool:
        """Whether its record was there, and is no more; not for the moment in which a copy takes its place."""
        return self._seen_at is not None and time.monotonic() > self._seen_at + GONE_S

    @property
    def state(self) -> str:
        """As its record says; lost, where nobody leads it any more; deleted, where that was done."""
        return "lost" if self._is_lost else self.record.state

    def done(self) -> bool:
        """Whether it has ended, in whatever way; it has, too, when its agent is gone."""
        return self._has_ended(self.record)

    def _has_ended(self, record: RunRecord) -> bool:
        if not record.is_active:
            return True
        if (record.agent or record.owner) and time.monotonic() > self._asked_at + ALIVE_S:
            try:
                told = self._server().ask("GET", f"runs/{self.run_id}", timeout_s=ALIVE_S)
                self._is_lost = told["state"] == "lost"
            except LLMCloudError:
                pass  # the server is being started again: the next time
            self._asked_at = time.monotonic()
        return self._is_lost

    def result(self, timeout: float | None = None) -> RunRecord:
        """Wait for the end.

        Raises RankError when it failed, `concurrent.futures.CancelledError` when it was stopped, WorldError when it was
        lost with its host, TimeoutError after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.run_id} has not ended in {timeout:g} s; it goes on.")
            time.sleep(POLL_S)
        return self._ended()

    def _ended(self) -> RunRecord:
        record = self.record
        if record.state == "failed" and record.errors:
            first = record.errors[0]
            raise RankError(
                first["rank"],
                first["ename"],
                first["evalue"],
                first["traceback"],
                run_id=self.run_id,
                place=first.get("place", ""),
                local_variables=first.get("locals"),
            )
        if record.state == "deleted":
            raise NotFound(f"run {self.run_id} was deleted.")
        if record.state == "stopped":
            raise CancelledError(f"run {self.run_id} was stopped.")
        if self.state == "lost":
            raise WorldError(f"run {self.run_id} was lost: the agent that led it has gone. %runs attach shows it.")
        return record

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end; what `result` would raise, None when the run has finished."""
        try:
            self.result(timeout)
        except (LLMCloudError, CancelledError) as error:
            return error
        return None

    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return self.record.state in ("running", "stopping") and not self.done()

    def cancelled(self) -> bool:
        """Whether it was stopped."""
        return self.state == "stopped"

    def __await__(self) -> Generator[Any, None, RunRecord]:
        return self._wait().__await__()

    async def _wait(self) -> RunRecord:
        while not self.done():
            await asyncio.sleep(POLL_S)
        return self._ended()

    def cancel(self) -> bool:
        """Press Stop; returns whether there was anything to stop: nothing was when it has ended at that moment."""
        if self.done():
            return False
        try:
            self._server().stop_run(self.run_id)
        except (NotFound, UsageError):  # its agent has no such run any more, or its record says that it has ended
            if self.record.is_active:
                raise
            return False
        return True

    def _press_stop(self) -> None:
        self.cancel()

    def logs(self, rank: int | None = None, tail: int | None = None) -> str:
        """What the ranks (or one of them) have written so far, each line labelled with its rank; the last `tail`."""
        found = log_text.lines(self.folder, rank)
        return "\n".join(found if tail is None else deque(found, maxlen=tail))

    @property
    def alerts(self) -> list[dict[str, Any]]:
        """What its detectors have found so far: {"t", "detector", "step", "text", "evidence", "ranks", ...}."""
        return self.folder.alerts()

    def metrics(self) -> pandas.DataFrame:
        """A row per logged dict: rank, step, time `t` and the values. Needs pandas.

        A value that is itself called rank or t is in the column `rank (logged)`; so is one called step, where the row
        has a step.
        """
        import pandas

        rows = [_row(rank, record) for rank, record in self.folder.records("metrics") if "values" in record]
        frame = pandas.DataFrame(rows)
        values = [column for column in frame.columns if column not in ("rank", "t")]
        return frame.assign(**{column: pandas.to_numeric(frame[column], errors="coerce") for column in values})

    def attach(self) -> None:
        """Show everything since the first step in this cell, then follow live. Stop leaves the run alone."""
        self._follow(has_live=True)

    def follow_logs(self, rank: int | None = None) -> None:
        """Show what the ranks (or one of them) write, from the first line on, until the run ends or Stop is pressed."""
        self._follow(has_live=False, rank=rank)

    def _begun(self) -> RunRecord:
        """Its record, once it has ranks; a run may wait for them."""
        said: set[str] = set()
        while not (record := self.record).ranks and not self._has_ended(record):
            for why in [why for why in record.notes if why not in said]:
                print(f"{self.run_id} {why}", flush=True)
                said.add(why)
            time.sleep(POLL_S)
        return record

    def _follow(self, has_live: bool, rank: int | None = None) -> None:
        from jupyter_llmcloud.magics.output.run_view import RunDisplay

        record = self._begun()
        ranks = [number for number in record.ranks if rank in (None, number)]
        view = RunDisplay(
            self.run_id, record.name, ranks, stop=self._press_stop, since=record.created or None, has_live=has_live
        )
        journals = RunJournals(self.folder, ranks)
        states: dict[int, tuple[str, str]] = {}
        ended = False
        with short_switch_intervals(), StopSignal() as stop:
            while not stop.presses:
                record = self.record
                ended = self._has_ended(record)
                ranks = [number for number in record.ranks if rank in (None, number)]
                journals.follow(ranks)
                for number in ranks:
                    if (state_now := record.rank_state(number)) != states.get(number):
                        states[number] = state_now
                        view.rank_state(number, *state_now)
                for number, records in journals.metrics() if has_live else ():
                    view.records("metrics", number, records)
                view.past(journals.logs())
                view.times(*self._times(record), record.price)
                view.tick()
                if ended:
                    break
                time.sleep(POLL_S)
        state = "lost" if self._is_lost else record.state
        view.finish(state, record.errors, record.notes, record.ended)
        if not ended:
            print(f"Detached. The run goes on: %runs attach {self.run_id}")
        elif words := _describe_end(state, record):
            print(f"Run {self.run_id} {words}")

    def _times(self, record: RunRecord) -> tuple[Times, Times]:
        shares, seconds = self.folder.read_times()
        return shares, record.times or seconds

    def _ipython_display_(self) -> None:
        from jupyter_llmcloud.magics.output.run_card import RunCard
        from jupyter_llmcloud.widgets.front_end import find_front_end

        front_end = find_front_end()
        if front_end.takes_widgets:
            RunCard(self, front_end).show()
        else:
            print(repr(self))

    def __repr__(self) -> str:
        return f"<run {self.run_id}: {self.state}>"


def _row(rank: int, record: Mapping[str, Any]) -> dict[str, Any]:
    row = {"rank": rank, "step": record.get("step"), "t": record["t"]}
    return row | {(name if row.get(name) is None else f"{name} (logged)"): v for name, v in record["values"].items()}


def named(target: Any) -> str:
    """What names a run or a folder, as text; of a handle its id."""
    return target.run_id if isinstance(target, RunHandle) else str(target)


def _describe_end(state: str, record: RunRecord) -> str:
    """How a run ended that has not finished; "" for one that has."""
    error = record.errors[0] if record.errors else {}
    match state:
        case "stopped":
            return f"was stopped after {format_duration((record.ended or record.created) - record.created)}."
        case "failed" if error:
            return f"failed on rank {error['rank']}: {error['ename']}: {error['evalue']}".split("\n")[0]
        case "lost":
            return "is lost: its agent has gone. What it wrote until then is above."
    return "" if state == "finished" else f"ended as {state}."
