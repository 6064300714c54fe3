"""A run from outside: the futures shape over its folder, so that it works from any kernel at any time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.errors import NotFound, RankError
from jupyter_llmcloud.magics.stop_signal import StopSignal
from jupyter_llmcloud.storage.journal import Cursor, read_from
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore

if TYPE_CHECKING:
    import pandas

    from jupyter_llmcloud.magics.session import Session

POLL_S = 0.05


class RunHandle:
    """A run by its id: `done()`, `result()`, `cancel()`, `logs()`, `metrics()`; can be awaited."""

    def __init__(self, run_id: str, session: Session) -> None:
        self.run_id = run_id
        self.folder: RunFolder = RunStore().folder(run_id)
        self._session = session

    @property
    def record(self) -> RunRecord:
        """Its `run.json` as it is now; queued when it has not begun."""
        try:
            return self.folder.read()
        except NotFound:
            return RunRecord(self.run_id, self.run_id)

    @property
    def state(self) -> str:
        return self.record.state

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return not self.record.is_active

    def result(self, timeout: float | None = None) -> RunRecord:
        """Wait for the end. Raises RankError when it failed, TimeoutError after `timeout` seconds."""
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
        return record

    def __await__(self) -> Generator[Any, None, RunRecord]:
        return self._wait().__await__()

    async def _wait(self) -> RunRecord:
        while not self.done():
            await asyncio.sleep(POLL_S)
        return self._ended()

    def cancel(self) -> bool:
        """Press Stop; returns whether there was anything to stop."""
        if self.done():
            return False
        self._session.server.stop_run(self.run_id)
        return True

    def _press_stop(self) -> None:
        self.cancel()

    def logs(self, rank: int | None = None) -> str:
        """What the ranks (or one of them) have written so far, each line labelled with its rank."""
        lines = []
        for number, record in self.folder.records("logs"):
            if rank is None or rank == number:
                text = record.get("text") or record.get("data", {}).get("text/plain", "")
                lines += [f"[{number}] {line}" for line in text.splitlines()]
        return "\n".join(lines)

    def metrics(self) -> pandas.DataFrame:
        """A row per logged dict: rank, step, time and the values. Needs pandas."""
        import pandas

        rows = [
            {"rank": rank, "step": record.get("step"), "t": record["t"], **record["values"]}
            for rank, record in self.folder.records("metrics")
            if "values" in record
        ]
        frame = pandas.DataFrame(rows)
        values = [column for column in frame.columns if column not in ("rank", "t")]
        return frame.assign(**{column: pandas.to_numeric(frame[column], errors="coerce") for column in values})

    def attach(self) -> None:
        """Show everything since the first step in this cell, then follow live. Stop leaves the run alone."""
        from jupyter_llmcloud.magics.run_view import RunView

        record = self.record
        view = RunView(self.run_id, record.name, record.ranks, stop=self._press_stop)
        cursors = {(journal, rank): Cursor() for journal in ("metrics", "logs") for rank in record.ranks}
        with StopSignal() as stop:
            while not stop.presses:
                record = self.record
                for (journal, rank), cursor in cursors.items():
                    path = self.folder.logs(rank) if journal == "logs" else self.folder.metrics(rank)
                    while records := read_from(path, cursor):
                        view.records(journal, rank, records)
                view.tick()
                if not record.is_active:
                    view.finish(record.state, record.errors)
                    return
                time.sleep(POLL_S)
        view.finish(record.state)
        print(f"Detached. The run goes on: %runs attach {self.run_id}")

    def __repr__(self) -> str:
        return f"<run {self.run_id}: {self.state}>"
