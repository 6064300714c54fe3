"""A run in the cell that shows it: folded text, rich output, the live view, and how it ended."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from IPython.display import clear_output, publish_display_data

from jupyter_llmcloud.core.output.blocks import Block
from jupyter_llmcloud.core.output.folding import OutputFolder
from jupyter_llmcloud.core.run.end_report import own_errors
from jupyter_llmcloud.magics.output.cell_output import CellOutput
from jupyter_llmcloud.magics.output.log_link import FullLog
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.storage.runs import Times, nonce
from jupyter_llmcloud.system.gil import Pace
from jupyter_llmcloud.widgets.front_end import find_front_end, is_watched
from jupyter_llmcloud.widgets.live_view import LiveView

LIVE_AFTER_S = 2.0  # a cell that is done by then and logs nothing needs no live view
IDLE_S = 1.0
HOLD_S = 0.08  # how long a line waits for the same line of another rank
READ_HOLD_S = 0.3  # where journals are read in turns


class NotebookOutput:
    """The output of the cell that is being executed, as the area that a CellOutput is shown in."""

    def __init__(self) -> None:
        self._stream = sys.stdout

    def write(self, kind: str, text: str) -> None:
        """Text; each stream has a buffer of its own, their order is kept here."""
        stream = sys.stderr if kind == "stderr" else sys.stdout
        if stream is not self._stream:
            self._stream.flush()
            self._stream = stream
        stream.write(text)

    def flush(self) -> None:
        """Have it on its way."""
        self._stream.flush()

    def show(self, data: Mapping[str, Any], metadata: Mapping[str, Any], display_id: str, update: bool) -> None:
        """A display that can be replaced."""
        self.flush()
        publish: Callable[..., None] = publish_display_data
        publish(dict(data), dict(metadata), transient={"display_id": display_id}, update=update)

    def clear(self, wait: bool) -> None:
        """Everything below the cell."""
        self.flush()
        clear_output(wait=wait)


class ViewClock:
    """Seconds that never go backwards, though clocks of hosts differ and records of the past come with their own.

    Attributes:
        last: the latest that was told.
    """

    def __init__(self, is_replayed: bool) -> None:
        self._read = time.time if is_replayed else time.monotonic
        self.last = 0.0

    def now(self) -> float:
        """The time of what happens now."""
        return self.at(self._read())

    def at(self, seconds: float) -> float:
        """The time of what happened then."""
        self.last = max(self.last, seconds)
        return self.last


class RunDisplay:
    """Fed with records and states in any order of ranks; shows each (journal, rank, seq) once.

    Args:
        stop: what the Stop button of the live view does.
        since: when the run began, for one that is shown afterwards: its records then carry the time.
        has_live: whether there is a live view beside the output.
        live: that view, where it has been in the cell since before there were ranks.
    """

    def __init__(
        self,
        run_id: str,
        name: str,
        ranks: Sequence[int],
        stop: Callable[[], None],
        *,
        since: float | None = None,
        has_live: bool = True,
        live: LiveView | None = None,
    ) -> None:
        front_end = find_front_end()
        self.live = live or LiveView(run_id, name, (), stop, started=since, front_end=front_end)
        self.live.begin(list(ranks), stop)
        hold_s = HOLD_S if since is None else READ_HOLD_S
        self._full_log = FullLog(run_id, name)
        self.folder = OutputFolder(ranks, hold_s, name=name, where=self._full_log.where)
        self._is_watched = is_watched()
        self.folder.shows_passing = self._is_watched and not has_live
        self._cell = NotebookOutput()
        self._page = CellOutput(
            f"{run_id}/{nonce()}",  # the same run may be shown in another cell
            self._cell,
            self.live.show_again,
            has_labels=len(ranks) > 1,
            can_clear=front_end.takes_widgets,
        )
        self._seen: dict[tuple[str, int], int] = {}
        self._clock = ViewClock(is_replayed=since is not None)
        self._began = self._clock.now() if since is None else since
        self._has_live = has_live
        self._is_live = False
        self._was_full = False
        if self.live.is_placed:
            self._page.add_view()

    # --- what happens ---

    def records(self, journal: str, rank: int, records: Sequence[dict[str, Any]]) -> None:
        """Records of one rank's journal."""
        last = self._seen.get((journal, rank), 0)
        fresh = [record for record in records if record["seq"] > last]
        if not fresh:
            return
        self._seen[(journal, rank)] = fresh[-1]["seq"]
        if journal == "metrics":
            self.live.handle_metrics(rank, fresh)
            self._go_live()
            return
        now = self._clock.now()
        for record in fresh:
            self._record(rank, record, now)

    def past(self, rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
        """Log records of all ranks in order of time, folded as they would have been then."""
        pace = Pace()  # perhaps in a thread, beside which the kernel is to answer
        for rank, record in rows:
            pace.rest_when_due()
            if record["seq"] > self._seen.get(("logs", rank), 0):
                self._seen["logs", rank] = record["seq"]
                self._record(rank, record, self._clock.at(record["t"]))

    def _record(self, rank: int, record: Mapping[str, Any], now: float) -> None:
        kind = record["kind"]
        if kind in ("stdout", "stderr"):
            if record.get("warning"):  # which begins with the file that it is about
                self._show(self.folder.feed_warning(rank, kind, shown(record["text"]), now), now)
            else:
                self._show(self.folder.feed(rank, kind, record["text"], now), now)
        elif kind in ("display", "result", "clear_output"):
            self._show(self.folder.feed_rich(rank, record, now), now)
        elif kind == "report":
            self.live.handle_report(record, is_printed=True)
            self.note(record["text"])

    def note(self, text: str) -> None:
        """A word on the run."""
        now = self._clock.last
        self._show(self.folder.note(shown(text), now), now)

    def queued(self, why: str) -> None:
        """The run waits for its turn; the view says so at once."""
        self.live.handle_state("queued")
        self._go_live()
        self.note(f"queued: {why}")

    def rank_state(self, rank: int, state: str, detail: str = "") -> None:
        """A rank's state has changed."""
        self.live.handle_rank_state(rank, state, detail)

    def times(self, shares: Times, seconds: Times, price: float = 0.0) -> None:
        """Where the ranks spend their time, and what an hour of one costs."""
        self.live.handle_times(shares, seconds, price)

    def stopping(self) -> None:
        """Stop was pressed."""
        self.live.handle_state("stopping")

    def tick(self) -> None:
        """Show what has waited long enough."""
        now = self._clock.now()
        self._show(self.folder.flush(now), now)
        self._page.tick(now)
        if now - self._began > LIVE_AFTER_S:
            self._go_live()
        if self._is_live:
            self.folder.shows_passing = self._is_watched  # below the view, which then has its place
            self.live.refresh(time.time())

    def next_tick_s(self) -> float:
        """Seconds until `tick` has something to do."""
        now = self._clock.now()
        times = [IDLE_S if self._is_live else max(0.0, self._began + LIVE_AFTER_S - now)]
        if self._is_live and (due := self.live.next_deadline()) is not None:
            times.append(max(0.0, due - time.time()))
        for deadline in (self.folder.next_deadline(), self._page.next_deadline()):
            if deadline is not None:
                times.append(max(0.0, deadline - now))
        return min(times)

    def finish(
        self,
        state: str,
        errors: Sequence[dict[str, Any]] = (),
        report: Sequence[str] = (),
        ended: float | None = None,
    ) -> None:
        """The run is over: what waits is shown, the live view becomes its static version."""
        now = self._clock.now()
        self._show(self.folder.flush(now, final=True), now)
        self._page.finish(now)
        self._cell.flush()
        if self._is_live:
            shown = own_errors(errors) if state == "failed" else []
            self.live.finish(state, time.time() if ended is None else ended, errors=shown, report=report)
        else:
            self.live.withdraw()
        if self.folder.is_full:
            threading.Thread(target=self._full_log.write, name="llmcloud-log", daemon=True).start()

    def _go_live(self) -> None:
        if self._has_live and not self._is_live:
            self._is_live = True
            self._cell.flush()
            was_placed = self.live.is_placed
            self.live.show()
            if not was_placed:
                self._page.add_view()

    # --- showing ---

    def _show(self, blocks: Sequence[Block], now: float) -> None:
        if blocks:
            self._page.add(blocks, now)
            self._cell.flush()
        if self.folder.is_full != self._was_full:
            self._was_full = self.folder.is_full
            if self._was_full:
                self._link_to_log(now)

    def _link_to_log(self, now: float) -> None:
        """The cell has said by its path where the rest is: have it there, and a link where a browser can follow it."""
        if data := self._full_log.link():
            record = {"kind": "display", "data": data}
            self._page.add([Block("display", data["text/plain"], self.folder.ranks, record=record)], now)
            self._cell.flush()
