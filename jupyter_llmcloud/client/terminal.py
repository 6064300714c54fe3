"""A run in a terminal: the labelled output of its ranks, a line of progress below it, and its end."""

from __future__ import annotations

import io
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from jupyter_llmcloud.core.metrics import wording
from jupyter_llmcloud.core.metrics.series import MetricCollector
from jupyter_llmcloud.core.output.blocks import Block
from jupyter_llmcloud.core.output.folding import OutputFolder
from jupyter_llmcloud.core.output.progress_line import NOTHING_SPENT, progress_line
from jupyter_llmcloud.storage.journal import Record

HOLD_S = 0.3  # how long a line waits for the same line of another rank: journals are read in turns
REDRAW_S = 0.2
_COLORS = re.compile(r"\x1b\[[\d;]*m")


_MAGIC = re.compile(
    r"(?<![%\w])%(endpoints keys|endpoints|compress|export|explain|prepare|shards|runs|sweeps|cluster)\b"
)
_AS_TYPED = {"cluster": "clusters", "endpoints keys": "keys"}


def in_terminal(text: str) -> str:
    """What a message tells to type in a notebook, as it is typed in a terminal: `%runs stop x`."""
    return _MAGIC.sub(lambda found: f"jupyter llmcloud {_AS_TYPED.get(found[1], found[1])}", text)


def status_of(text: str) -> int | None:
    """The exit status of sys.exit() with a number; None where it was left with something else, which Python prints."""
    return int(text) & 0xFF if text.removeprefix("-").isdecimal() else None


def with_escapes(stream: TextIO) -> TextIO:
    """The stream, which writes what its encoding has not as Python's stderr does: it would refuse it."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream


class TerminalOutput:
    """Text of the run to stdout and stderr as ranks wrote it; words on it, and the progress, to stderr.

    Args:
        name: of the run.
        ranks: whose output comes.
        began: when the run did, in seconds since the epoch.
        out: in place of stdout.
        err: in place of stderr; the line of progress is drawn only where it is a terminal.

    Attributes:
        state: of the run.
        spent: the price of an hour of a rank (0: none), the seconds of all ranks so far, how many they are.
    """

    def __init__(
        self, name: str, ranks: Sequence[int], began: float, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.state = "running"
        self.spent = NOTHING_SPENT
        self._name = name
        self._began = began
        self._out, self._err = with_escapes(out or sys.stdout), err or sys.stderr
        self._has_line = self._err.isatty()
        self._folder = OutputFolder(ranks, HOLD_S, sys.maxsize, name=name)
        self._folder.shows_passing = False
        self._metrics = MetricCollector()
        self._now = 0.0
        self._line = ""
        self._drawn_at = 0.0

    def metrics(self, rank: int, records: Sequence[Record]) -> None:
        """Records of a rank's metrics and progress."""
        self._metrics.feed(rank, records, self._now)

    def rank_has_gone(self, rank: int) -> None:
        """A rank logs nothing any more: a mean does not wait for it."""
        self._metrics.leave(rank)

    @property
    def alarms(self) -> list[str]:
        """`loss is NaN since step 60`."""
        return wording.alarms(self._metrics.series)

    def logs(self, rows: Iterable[tuple[int, Record]]) -> None:
        """Log records of all ranks in order of time."""
        for rank, record in rows:
            self._now = max(self._now, record["t"])
            self._show(self._blocks(rank, record))

    def _blocks(self, rank: int, record: Record) -> list[Block]:
        kind = record["kind"]
        if kind in ("stdout", "stderr"):
            feed = self._folder.feed_warning if record.get("warning") else self._folder.feed
            return feed(rank, kind, record["text"], self._now)
        if kind in ("display", "result") and not record.get("update"):
            text = (record.get("data") or {}).get("text/plain", "")
            return self._folder.feed_rich(rank, {"kind": kind, "data": {"text/plain": text}}, self._now)
        return self._folder.note(record["text"], self._now) if kind == "report" else []

    def tick(self) -> None:
        """Show what has waited long enough, and how far the run is."""
        self._now = max(self._now, time.time())
        self._show(self._folder.flush(self._now))
        if self._has_line and self._now - self._drawn_at > REDRAW_S:
            self._draw()

    def say(self, text: str) -> None:
        """A word on the run."""
        self._erase()
        print(text, file=self._err, flush=True)

    def detach(self) -> None:
        """Nothing more is shown of a run that goes on."""
        self._show(self._folder.flush(self._now, final=True))

    def finish(self, state: str, errors: Sequence[dict[str, Any]]) -> None:
        """The run has ended: what waits is shown, and the traceback of the rank that failed first."""
        self._now = max(self._now, time.time())
        self._show(self._folder.flush(self._now, final=True))
        self._erase()
        if state == "failed" and errors:
            self._draw_error(errors[0])

    def _draw_error(self, error: dict[str, Any]) -> None:
        if error["ename"] == "SystemExit":
            if (text := str(error.get("evalue", ""))) and status_of(text) is None:
                self.say(text)  # sys.exit("why"), as Python does
            return
        lines = "\n".join(error["traceback"])
        self.say(lines if self._err.isatty() else _COLORS.sub("", lines))
        where = f" at {error['place']}" if error.get("place") else ""
        self.say(f"rank {error['rank']} failed{where}.")

    # --- drawing ---

    def _show(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            if not block.text:
                continue
            self._erase()
            stream = self._err if block.kind == "stderr" else self._out
            stream.write(block.text if block.text.endswith("\n") else block.text + "\n")
            stream.flush()

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        elapsed_s = self._now - self._began
        line = progress_line(self._name, self.state, self._metrics, elapsed_s, self._now, width, self.spent)
        self._drawn_at = self._now
        if line != self._line:
            self._line = line
            self._err.write(f"\r\x1b[K{line}")
            self._err.flush()

    def _erase(self) -> None:
        if self._line:
            self._line = ""
            self._err.write("\r\x1b[K")
            self._err.flush()
            self._drawn_at = 0.0
