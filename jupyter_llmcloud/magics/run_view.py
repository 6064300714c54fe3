"""A run in the cell that shows it: folded text, rich output, the live view, and how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from IPython.display import display, publish_display_data, update_display

from jupyter_llmcloud.core.folding import Block, OutputFolder
from jupyter_llmcloud.widgets.live_view import LiveView

LIVE_AFTER_S = 2.0  # a cell that is done by then and logs nothing needs no live view
REFRESH_S = 0.2


class RunView:
    """Fed with records and states in any order of ranks; shows each (journal, rank, seq) once.

    Args:
        stop: what the Stop button of the live view does.
    """

    def __init__(self, run_id: str, name: str, ranks: Sequence[int], stop: Callable[[], None]) -> None:
        self.run_id = run_id
        self.live = LiveView(run_id, name, list(ranks), stop)
        self.folder = OutputFolder(ranks, name=name)
        self._seen: dict[tuple[str, int], int] = {}
        self._began = time.monotonic()
        self._is_live = False
        self._displays: set[str] = set()

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
        now = time.monotonic()
        for record in fresh:
            if record["kind"] in ("stdout", "stderr"):
                self._show(self.folder.feed(rank, record["kind"], record["text"], now))
            elif record["kind"] in ("display", "result"):
                self._show(self.folder.feed_rich(rank, record, now))
            elif record["kind"] == "report":
                self._show(self.folder.flush(now, final=True))
                sys.stdout.write(record["text"])

    def rank_state(self, rank: int, state: str, detail: str = "") -> None:
        """A rank's state has changed."""
        self.live.handle_rank_state(rank, state, detail)

    def stopping(self) -> None:
        """Stop was pressed."""
        self.live.handle_state("stopping")

    def tick(self) -> None:
        """Show what has waited long enough."""
        now = time.monotonic()
        self._show(self.folder.flush(now))
        if now - self._began > LIVE_AFTER_S:
            self._go_live()
        if self._is_live:
            self.live.refresh(time.time())

    def next_tick_s(self) -> float:
        """Seconds until `tick` has something to do."""
        now = time.monotonic()
        times = [REFRESH_S if self._is_live else max(0.0, self._began + LIVE_AFTER_S - now)]
        if (deadline := self.folder.next_deadline()) is not None:
            times.append(max(0.0, deadline - now))
        return min(times)

    def finish(self, state: str, errors: Sequence[dict[str, Any]] = ()) -> None:
        """The run is over: what waits is shown, the live view becomes its static version."""
        self._show(self.folder.flush(time.monotonic(), final=True))
        if self._is_live:
            self.live.finish(state, time.time(), errors=list(errors) if state == "failed" else [])

    def _go_live(self) -> None:
        if not self._is_live:
            self._is_live = True
            self.live.show()

    # --- showing ---

    def _show(self, blocks: Sequence[Block]) -> None:
        stream = sys.stdout
        for block in blocks:
            following = sys.stderr if block.kind == "stderr" else sys.stdout
            if following is not stream or block.record is not None:
                stream.flush()  # each stream has a buffer of its own: their order is kept by us
            stream = following
            if block.record is None:
                stream.write(block.text)
            else:
                self._show_rich(block)
        if blocks:
            stream.flush()

    def _show_rich(self, block: Block) -> None:
        record = block.record or {}
        data, metadata = dict(record["data"]), dict(record.get("metadata") or {})
        if set(data) == {"text/plain"} and record["kind"] == "result":
            label = f"Out{block.label}" if block.label else "Out"
            text = data["text/plain"]
            sys.stdout.write(f"{label}: {text}\n" if "\n" not in text else f"{label}:\n{text}\n")
            return
        display_id = record.get("display_id")
        if display_id:
            display_id = f"{self.run_id}/{block.ranks[0] if block.ranks else 0}/{display_id}"
            if record.get("update"):
                if display_id in self._displays:
                    update_display(data, raw=True, metadata=metadata, display_id=display_id)
                return
            self._displays.add(display_id)
        if block.label:
            sys.stdout.write(f"{block.label}\n")
        if display_id:
            display(data, raw=True, metadata=metadata, display_id=display_id)
        else:
            publish_display_data(data, metadata)
