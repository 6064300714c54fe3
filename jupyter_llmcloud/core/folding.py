"""The output of many ranks becomes one readable stream: identical lines once, different ones labelled.

Every complete line waits up to `hold_s` for the same line of other ranks. The order of each rank's own output
is always kept. Text that is still being written (a line without its end, a bar that rewrites itself) is shown
as one passing line of one rank, rewritten in place, until it is complete; then it is a line like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.names import format_ranks
from jupyter_llmcloud.core.screen import Screen

MAX_CHARS = 150_000
MAX_RICH_CHARS = 4_000_000  # figures are what a cell is run for: a budget of their own
MAX_PASSING_WIDTH = 120
_PASSING_EVERY_S = 0.1
_SLOWDOWN = 0.02  # after t seconds it is rewritten every t/50: a few hundred times however long the run
_RICH_PATIENCE = 10  # ranks draw the same figure at moments further apart than they print the same line
_LOOK_AHEAD = 32  # how many lines of a rank may be pulled forward to reach one that can be folded
_CUT_WIDTH = 2_000


@dataclass(frozen=True)
class Block:
    """Something to show, in order.

    `kind` is "stdout" or "stderr" (write `text` as it is to that stream), or the kind of a rich record:
    "display", "result", "error". Then `record` is to be shown, under `label` when that is not empty, and
    `text` stands in for it where only text can be shown. A `passing` block rewrites itself with carriage
    returns.
    """

    kind: str
    text: str
    ranks: tuple[int, ...] = ()
    label: str = ""
    record: Mapping[str, Any] | None = None
    passing: bool = False


class _Item:
    """A complete line or a rich record of one rank, waiting."""

    __slots__ = ("arrived", "key", "rank", "record", "shown")

    def __init__(self, rank: int, key: tuple[str, str], arrived: float, record: Mapping[str, Any] | None) -> None:
        self.rank = rank
        self.key = key
        self.arrived = arrived
        self.record = record
        self.shown = False


@dataclass
class _Rank:
    """What a rank has written and not yet seen shown."""

    queue: deque[_Item] = field(default_factory=deque)
    screens: dict[str, Screen] = field(default_factory=dict)
    num_chars: int = 0


class OutputFolder:
    """Text and rich records of ranks in, blocks to show out. Time is an argument: any clock going forward.

    Attributes:
        num_dropped_lines: lines that are in the full log only, because the cell has had `max_chars`.
        num_dropped_rich: displays that are in the full log only.
    """

    def __init__(
        self, ranks: Iterable[int], hold_s: float = 0.08, max_chars: int = MAX_CHARS, *, name: str = ""
    ) -> None:
        self.ranks = tuple(sorted(set(ranks)))
        self.hold_s = hold_s
        self.max_chars = max_chars
        self.name = name
        self.num_dropped_lines = 0
        self.num_dropped_rich = 0
        self._ranks = {rank: _Rank() for rank in self.ranks}
        self._arrivals: deque[_Item] = deque()
        self._waiting: dict[tuple[str, str], dict[int, int]] = {}
        self._num_chars = 0
        self._num_rich_chars = 0
        self._is_full = False
        self._settling: dict[tuple[int, str], Screen] = {}
        self._passing = _PassingLine(hold_s, max_chars // 3)

    def feed(self, rank: int, kind: str, text: str, now: float) -> list[Block]:
        """Take in text that a rank wrote to `kind` ("stdout" or "stderr"); return what can be shown now."""
        state = self._state(rank)
        if self._is_full or state.num_chars > self.max_chars:
            self.num_dropped_lines += text.count("\n")
            return self.flush(now)
        screen = state.screens.setdefault(kind, Screen(self.max_chars))
        for line in screen.write(text, now):
            self._take_line(state, rank, kind, line, now)
        if screen.settling_since is not None:
            self._settling[rank, kind] = screen
        if screen.is_live:
            self._passing.touch((rank, kind), screen, now)
        return self.flush(now)

    def feed_rich(self, rank: int, record: Mapping[str, Any], now: float) -> list[Block]:
        """Take in a display, result or error record of a rank; return what can be shown now."""
        state = self._state(rank)
        self._close_lines(state, rank, now)
        kind = str(record.get("kind", "display"))
        content = {name: value for name, value in record.items() if name not in ("seq", "t")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
        self._wait(_Item(rank, (kind, digest), now, record), state)
        return self.flush(now)

    def flush(self, now: float, final: bool = False) -> list[Block]:
        """What can be shown at `now`; with `final`, everything."""
        if self._settling:
            self._settle(now)
        if final:
            for rank, state in self._ranks.items():
                self._close_lines(state, rank, now)
        blocks = _Joiner()
        for ranks, item in self._ready(now, final):
            self._show(blocks, ranks, item)
        if final:
            self._passing.erase(blocks)
        elif not self._is_full:
            self._num_chars += self._passing.show(blocks, self.label, now)
        return blocks.finish()

    def next_deadline(self) -> float | None:
        """When `flush` will have something to show, None when nothing waits."""
        starts = [screen.settling_since for screen in self._settling.values()]
        times = [start + self.hold_s for start in starts if start is not None]
        if (head := self._head()) is not None:
            times.append(head.arrived + self._hold_s(head))
        if not self._is_full and (due := self._passing.due) is not None:
            times.append(due)
        return min(times, default=None)

    # --- taking in -----------------------------------------------------------------------------------------

    def _state(self, rank: int) -> _Rank:
        if rank not in self._ranks:  # a rank that joined later (an elastic world)
            self._ranks[rank] = _Rank()
            self.ranks = tuple(sorted(self._ranks))
        return self._ranks[rank]

    def _take_line(self, state: _Rank, rank: int, kind: str, line: str, now: float) -> None:
        if state.num_chars > self.max_chars:
            self.num_dropped_lines += 1
            return
        state.num_chars += len(line) + 1
        self._wait(_Item(rank, (kind, line), now, None), state)

    def _wait(self, item: _Item, state: _Rank) -> None:
        state.queue.append(item)
        self._arrivals.append(item)
        ranks = self._waiting.setdefault(item.key, {})
        ranks[item.rank] = ranks.get(item.rank, 0) + 1

    def _close_lines(self, state: _Rank, rank: int, now: float) -> None:
        for kind, screen in state.screens.items():
            for line in screen.close():
                self._take_line(state, rank, kind, line, now)

    def _settle(self, now: float) -> None:
        for (rank, kind), screen in list(self._settling.items()):
            since = screen.settling_since
            if since is not None and now - since < self.hold_s:
                continue
            del self._settling[rank, kind]
            for line in screen.settle() if since is not None else ():
                self._take_line(self._ranks[rank], rank, kind, line, now)

    # --- choosing ------------------------------------------------------------------------------------------

    def _head(self) -> _Item | None:
        """The item that has waited longest; it is also the first of its own rank."""
        while self._arrivals and self._arrivals[0].shown:
            self._arrivals.popleft()
        return self._arrivals[0] if self._arrivals else None

    def _hold_s(self, item: _Item) -> float:
        return self.hold_s if item.record is None else self.hold_s * _RICH_PATIENCE

    def _ready(self, now: float, final: bool) -> Iterator[tuple[tuple[int, ...], _Item]]:
        """Items to show, in order, with the ranks they are shown for."""
        while (item := self._head()) is not None:
            everywhere = len(self._waiting[item.key]) == len(self._ranks) and self._heads_all(item.key)
            if not (everywhere or final or now - item.arrived >= self._hold_s(item)):
                return
            yield from self._fold(item)

    def _heads_all(self, key: tuple[str, str]) -> bool:
        return all(state.queue and state.queue[0].key == key for state in self._ranks.values())

    def _fold(self, item: _Item) -> Iterator[tuple[tuple[int, ...], _Item]]:
        """Show `item` for every rank that has it waiting where nothing else of another rank is in the way."""
        together = []
        for rank in sorted(self._waiting[item.key]):
            if rank != item.rank:
                before = self._in_the_way(rank, item.key)
                if before is None:
                    continue
                for _ in range(before):
                    other = self._ranks[rank].queue[0]
                    self._leave(rank)
                    yield (rank,), other
            together.append(rank)
        for rank in together:
            self._leave(rank)
        yield tuple(together), item

    def _in_the_way(self, rank: int, key: tuple[str, str]) -> int | None:
        """How many of the rank's lines come before `key`; None when one of them may yet be folded itself."""
        for at, item in enumerate(self._ranks[rank].queue):
            if item.key == key:
                return at
            if at == _LOOK_AHEAD or len(self._waiting[item.key]) > 1:
                return None
        return None

    def _leave(self, rank: int) -> None:
        item = self._ranks[rank].queue.popleft()
        item.shown = True
        ranks = self._waiting[item.key]
        ranks[rank] -= 1
        if not ranks[rank]:
            del ranks[rank]
            if not ranks:
                del self._waiting[item.key]

    # --- showing -------------------------------------------------------------------------------------------

    def label(self, ranks: tuple[int, ...]) -> str:
        """`[0-1]`, or nothing when the run has one rank only."""
        return f"[{format_ranks(list(ranks))}]" if len(self._ranks) > 1 else ""

    def _show(self, blocks: _Joiner, ranks: tuple[int, ...], item: _Item) -> None:
        kind, line = item.key
        label = self.label(ranks)
        if item.record is not None:
            self._show_rich(blocks, ranks, label, item.record)
            return
        text = f"{label} {line}" if label and line else label + line
        room = self.max_chars - self._num_chars
        if not self._is_full and len(text) < room:
            self._show_line(blocks, ranks, kind, text)
            return
        self.num_dropped_lines += len(ranks)
        if not self._is_full and min(room, len(text)) > _CUT_WIDTH:
            self._show_line(blocks, ranks, kind, text[: room - 2] + "…")
        self._say_full(blocks)

    def _show_line(self, blocks: _Joiner, ranks: tuple[int, ...], kind: str, text: str) -> None:
        self._num_chars += len(text) + 1
        if kind == "stdout":
            text = self._passing.over(text)
        else:
            self._passing.erase(blocks)
        blocks.add(kind, text + "\n", ranks)

    def _show_rich(self, blocks: _Joiner, ranks: tuple[int, ...], label: str, record: Mapping[str, Any]) -> None:
        kind = str(record.get("kind", "display"))
        size = sum(len(str(value)) for value in (record.get("data") or {}).values())
        if kind != "error":
            if self._num_rich_chars + size > MAX_RICH_CHARS:
                self.num_dropped_rich += 1
                self._say_full(blocks)
                return
            if not record.get("update"):  # an update replaces what was there: the cell does not grow
                self._num_rich_chars += size
        self._passing.erase(blocks)
        blocks.add_rich(Block(kind, _as_text(label, record), ranks, label, record))

    def _say_full(self, blocks: _Joiner) -> None:
        if not self._is_full:
            self._is_full = True
            self._passing.erase(blocks)
            where = f"%runs logs {self.name}".rstrip()
            blocks.add("stdout", f"… further output is in the full log: {where}\n", ())


class _PassingLine:
    """The one line that is rewritten in place: the newest state of what one rank is still writing.

    It is written to stdout whatever the rank wrote it to: front ends give stderr a colour of alarm, and a
    line that comes and goes must not break that stream in pieces.
    """

    def __init__(self, hold_s: float, budget: int) -> None:
        self._hold_s = hold_s
        self._budget = budget
        self._writer: tuple[int, str] | None = None
        self._screen: Screen | None = None
        self._began: float | None = None
        self._shown_at: float | None = None
        self._shown = ""
        self._is_new = False

    def touch(self, writer: tuple[int, str], screen: Screen, now: float) -> None:
        """A rank's unfinished text has changed; the lowest rank that writes is followed."""
        if self._began is None:
            self._began = now
        if self._live() is None or self._writer is None or writer <= self._writer:
            self._writer, self._screen = writer, screen
        if self._writer == writer:
            self._is_new = True

    @property
    def due(self) -> float | None:
        """When the newest state may be shown."""
        screen = self._live()
        if not self._is_new or screen is None or self._budget <= 0 or self._began is None:
            return None
        ripe = screen.live_since + (0.0 if screen.is_rewritten else 3 * self._hold_s)
        if self._shown_at is None:
            return ripe
        return max(ripe, self._shown_at + max(_PASSING_EVERY_S, (self._shown_at - self._began) * _SLOWDOWN))

    def show(self, blocks: _Joiner, label: Callable[[tuple[int, ...]], str], now: float) -> int:
        """Rewrite the line when its time has come; how many characters that took."""
        due, screen = self.due, self._live()
        if due is None or now < due or screen is None or self._writer is None:
            return 0
        ranks = (self._writer[0],)
        text = f"{label(ranks)} {screen.current[-MAX_PASSING_WIDTH:]}".lstrip()
        written = "\r" + text.ljust(len(self._shown))
        self._budget -= len(written)
        self._shown, self._shown_at, self._is_new = text, now, False
        blocks.add("stdout", written, ranks, passing=True)
        return len(written)

    def erase(self, blocks: _Joiner) -> None:
        """Take the line away."""
        if self._shown:
            blocks.add("stdout", "\r" + " " * len(self._shown) + "\r", (), passing=True)
            self._shown = ""
            self._is_new = True

    def over(self, text: str) -> str:
        """`text` for stdout, written over the line that is shown, if any."""
        if self._shown:
            text, self._shown = "\r" + text.ljust(len(self._shown)), ""
            self._is_new = True
        return text

    def _live(self) -> Screen | None:
        return self._screen if self._screen is not None and self._screen.is_live else None


class _Joiner:
    """Joins neighbouring text of the same stream and ranks to one block."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._head: tuple[str, tuple[int, ...], bool] | None = None
        self._parts: list[str] = []

    def add(self, kind: str, text: str, ranks: tuple[int, ...], passing: bool = False) -> None:
        head = (kind, ranks, passing)
        if head != self._head:
            self._end()
            self._head = head
        self._parts.append(text)

    def add_rich(self, block: Block) -> None:
        self._end()
        self._blocks.append(block)

    def finish(self) -> list[Block]:
        self._end()
        return self._blocks

    def _end(self) -> None:
        if self._head is not None:
            kind, ranks, passing = self._head
            self._blocks.append(Block(kind, "".join(self._parts), ranks, passing=passing))
        self._head, self._parts = None, []


def _as_text(label: str, record: Mapping[str, Any]) -> str:
    text = str((record.get("data") or {}).get("text/plain", ""))
    if not text:
        return ""
    return "".join(f"{label} {line}\n" if label else f"{line}\n" for line in text.split("\n"))
