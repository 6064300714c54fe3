"""The output of many ranks becomes one readable stream: identical lines once, different ones labelled.

Every complete line waits up to `hold_s` for the same line of other ranks. The order of each rank's own output
is always kept. Text that is still being written (a line without its end, a bar that rewrites itself) is shown
as one passing line of one rank, rewritten in place, until it is complete; then it is a line like any other.

A cell has room for `max_chars`, some of it for every rank. Of what a rank writes beyond that the newest line is shown
in passing, and at the end the last lines, and a word on how much is left out between.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.names import name_ranks
from jupyter_llmcloud.core.output.blocks import Block, Joiner, as_text, label_of
from jupyter_llmcloud.core.output.budget import Budget
from jupyter_llmcloud.core.output.live_line import PassingLine
from jupyter_llmcloud.core.output.tail import Tail
from jupyter_llmcloud.core.output.terminal import Screen

MAX_CHARS = 110_000  # as saved, in bytes; with the ends of ranks and the live view's static version that makes 200 kB
MAX_RICH_CHARS = 4_000_000  # figures are what a cell is run for: a budget of their own
_TAIL_FRACTION = 0.2  # of max_chars, on top of them
_TAIL_CHARS = 6_000  # of one rank
_LAST_LINE_CHARS = 12_000  # for the newest line of what is left out, rewritten in place
_RICH_PATIENCE = 10  # ranks draw the same figure at moments further apart than they print the same line
_LOOK_AHEAD = 32  # how many lines of a rank may be pulled forward to reach one that can be folded
_CUT_WIDTH = 2_000
_SAVED_LINE = 15  # indentation, quotes, comma
_SAVED_BLOCK = 120  # the names and brackets of an output
_STDERR_PATIENCE = 2  # a warning comes when a rank gets there, which depends on how fast it loads
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f]|\x1b(?!\[)")
_COLORS = re.compile(r"\x1b\[[\d;:]*m")
_RESET = "\x1b[0m"
_OWN_RANK = re.compile(r"\[rank\d+\]:\s?")  # torch's own label
_NATIVE_WARNING = re.compile(r"\[?W\d{4} \d\d:\d\d:\d\d[.\d]*( \d+)?")
_STAMP = re.compile(  # when and by which process a line was written: what differs where all says the same
    r"\[?[IWEF]\d{4} \d\d:\d\d:\d\d[.\d]*( \d+)?|\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d([.,]\d+)?\]?"
)

_BAR_TIMES = re.compile(r"\d\d:\d\d(:\d\d)?<\d\d:\d\d(:\d\d)?, +[\d.]+[^\s,\]]*")  # of a bar that has ended


def saved_size(line: str) -> int:
    """Bytes that a line takes in a notebook's file."""
    size = len(line) if line.isascii() else len(line.encode("utf-8", "replace"))
    return size + _SAVED_LINE + 5 * line.count("\x1b") + line.count('"') + line.count("\\")


class _Item:
    """A complete line or a rich record of one rank, waiting."""

    __slots__ = ("arrived", "key", "line", "rank", "record", "shown")

    def __init__(
        self, rank: int, key: tuple[str, str], arrived: float, record: Mapping[str, Any] | None, line: str = ""
    ) -> None:
        self.rank = rank
        self.key = key
        self.arrived = arrived
        self.record = record
        self.line = line
        self.shown = False


@dataclass
class _Rank:
    """What a rank has written and not yet seen shown."""

    queue: deque[_Item] = field(default_factory=deque)
    screens: dict[str, Screen] = field(default_factory=dict)
    num_chars: int = 0
    displays: dict[str, int] = field(default_factory=dict)  # by id, in the order of their first appearance
    num_warned: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False  # nothing more of it is shown but its end
    tail: Tail = field(default_factory=Tail)


class OutputFolder:
    """Text and rich records of ranks in, blocks to show out. Time is an argument: any clock going forward.

    Args:
        where: where the full log is, said when something is left out.

    Attributes:
        shows_passing: whether lines that are still being written are shown.
        num_dropped_rich: displays that are in the full log only.
    """

    def __init__(
        self, ranks: Iterable[int], hold_s: float = 0.08, max_chars: int = MAX_CHARS, *, name: str = "", where: str = ""
    ) -> None:
        self.ranks = tuple(sorted(set(ranks)))
        self.hold_s = hold_s
        self.max_chars = max_chars
        self.where = where or f"%runs logs {name}".rstrip()
        self.shows_passing = True
        self.num_dropped_rich = 0
        self._ranks = {rank: _Rank() for rank in self.ranks}
        self._arrivals: deque[_Item] = deque()
        self._waiting: dict[tuple[str, str], dict[int, int]] = {}
        self._text = Budget(max_chars)
        self._rich = Budget(MAX_RICH_CHARS)
        self._warned: dict[str, int] = {}
        self._is_full = False
        self._last_kind = ""
        self._flushed_at = float("-inf")
        self._settling: dict[tuple[int, str], Screen] = {}
        self._passing = PassingLine(hold_s, max_chars // 3)

    def feed(self, rank: int, kind: str, text: str, now: float) -> list[Block]:
        """Take in text that a rank wrote to `kind` ("stdout" or "stderr"); return what can be shown now."""
        state = self._state(rank)
        if state.is_cut or state.num_chars > self.max_chars:
            while state.screens:  # what was begun goes on in this text
                begun, screen = state.screens.popitem()
                state.tail.add_text(begun, "\n".join(screen.close()), now)
            self._leave_out(rank, kind, text, now)
            return self.flush(now) if now >= self._flushed_at + self.hold_s / 4 else []
        screen = state.screens.setdefault(kind, Screen(self.max_chars))
        for line in screen.write(text, now):
            self._take_line(state, rank, kind, line, now)
        if screen.settling_since is not None:
            self._settling[rank, kind] = screen
        if screen.is_live:
            self._passing.touch((rank, kind), screen, now)
        return self.flush(now)

    def feed_warning(self, rank: int, kind: str, text: str, now: float) -> list[Block]:
        """Take in a warning, of one line or several; it is shown once, however far apart the ranks say it."""
        state = self._state(rank)
        self._close_lines(state, rank, now)
        self._take_warning(state, rank, kind, text.removesuffix("\n"), now)
        return self.flush(now)

    def feed_rich(self, rank: int, record: Mapping[str, Any], now: float) -> list[Block]:
        """Take in a display, result, error or clear_output record of a rank; return what can be shown now."""
        state = self._state(rank)
        self._close_lines(state, rank, now)
        kind = str(record.get("kind", "display"))
        content = {name: value for name, value in record.items() if name not in ("seq", "t")}
        if "display_id" in content:  # made up by each rank for itself
            content["display_id"] = state.displays.setdefault(str(content["display_id"]), len(state.displays))
        if kind == "clear_output":
            state.num_chars = 0
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
        self._wait(_Item(rank, (kind, digest), now, record), state)
        return self.flush(now)

    def note(self, text: str, now: float) -> list[Block]:
        """A line of nobody's in particular, to be shown now."""
        blocks = Joiner()
        self._passing.erase(blocks)
        blocks.add("stdout", text.rstrip("\n") + "\n", ())
        return self.flush(now) + blocks.finish()

    def flush(self, now: float, final: bool = False) -> list[Block]:
        """What can be shown at `now`; with `final`, everything."""
        self._flushed_at = now
        if self._settling:
            self._settle(now)
        if final:
            for rank, state in self._ranks.items():
                self._close_lines(state, rank, now)
        blocks = Joiner()
        for items in self._ready(now, final):
            self._show(blocks, items, now)
        if final:
            self._passing.erase(blocks)
            self._show_tails(blocks, now)
        elif self.shows_passing:
            self._text.take((), self._passing.show(blocks, self.label, now))
        return blocks.finish()

    @property
    def is_full(self) -> bool:
        """Whether text or displays are left out, for want of room."""
        return self._is_full

    def next_deadline(self) -> float | None:
        """When `flush` will have something to show, None when nothing waits."""
        starts = [screen.settling_since for screen in self._settling.values()]
        times = [start + self.hold_s for start in starts if start is not None]
        if (head := self._head()) is not None:
            times.append(head.arrived + self._hold_s(head))
        if self.shows_passing and (due := self._passing.due) is not None:
            times.append(due)
        return min(times, default=None)

    # --- taking in -----------------------------------------------------------------------------------------

    def _state(self, rank: int) -> _Rank:
        if rank not in self._ranks:  # a rank that joined later (an elastic world)
            self._ranks[rank] = _Rank()
            self.ranks = tuple(sorted(self._ranks))
        return self._ranks[rank]

    def _take_line(self, state: _Rank, rank: int, kind: str, line: str, now: float) -> None:
        if state.is_cut or state.num_chars > self.max_chars:
            self._leave_out(rank, kind, f"{line}\n", now)
            return
        key = _BAR_TIMES.sub("", line) if "<" in line and "|" in line else line
        if kind == "stderr" and line:
            line = _OWN_RANK.sub("", line, count=1) if line.startswith("[rank") else line
            if line[0] in "[WIEF2" and (stamp := _STAMP.match(line)):
                key = line[stamp.end() :]
                if _NATIVE_WARNING.match(line):
                    self._take_warning(state, rank, kind, line, now, key)
                    return
        state.num_chars += len(line) + 1
        self._wait(_Item(rank, (kind, key), now, None, line), state)

    def _take_warning(
        self, state: _Rank, rank: int, kind: str, text: str, now: float, content: str | None = None
    ) -> None:
        content = text if content is None else content
        number = state.num_warned[content] = state.num_warned.get(content, 0) + 1
        key = (kind, f"\0{number}\0{content}")
        if number <= self._warned.get(content, 0) and key not in self._waiting:
            return  # another rank has said it
        self._warned[content] = max(number, self._warned.get(content, 0))
        state.num_chars += len(text) + 1
        self._wait(_Item(rank, key, now, None, text), state)

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
        if item.record is not None:
            return self.hold_s * _RICH_PATIENCE
        return self.hold_s * _STDERR_PATIENCE if item.key[0] == "stderr" else self.hold_s

    def _ready(self, now: float, final: bool) -> Iterator[list[_Item]]:
        """What to show, in order: the equal items of one or several ranks, that of the lowest rank first."""
        while (item := self._head()) is not None:
            everywhere = len(self._waiting[item.key]) == len(self._ranks) and self._heads_all(item.key)
            if not (everywhere or final or now - item.arrived >= self._hold_s(item)):
                return
            yield from self._fold(item)

    def _heads_all(self, key: tuple[str, str]) -> bool:
        return all(state.queue and state.queue[0].key == key for state in self._ranks.values())

    def _fold(self, item: _Item) -> Iterator[list[_Item]]:
        """Show `item` for every rank that has it waiting where nothing else of another rank is in the way."""
        together = []
        for rank in sorted(self._waiting[item.key]):
            if rank != item.rank:
                before = self._in_the_way(rank, item.key)
                if before is None:
                    continue
                for _ in range(before):
                    yield [self._leave(rank)]
            together.append(rank)
        yield [self._leave(rank) for rank in together]

    def _in_the_way(self, rank: int, key: tuple[str, str]) -> int | None:
        """How many of the rank's lines come before `key`; None when one of them may yet be folded itself."""
        for at, item in enumerate(self._ranks[rank].queue):
            if item.key == key:
                return at
            if at == _LOOK_AHEAD or len(self._waiting[item.key]) > 1:
                return None
        return None

    def _leave(self, rank: int) -> _Item:
        item = self._ranks[rank].queue.popleft()
        item.shown = True
        ranks = self._waiting[item.key]
        ranks[rank] -= 1
        if not ranks[rank]:
            del ranks[rank]
            if not ranks:
                del self._waiting[item.key]
        return item

    # --- showing -------------------------------------------------------------------------------------------

    def label(self, ranks: tuple[int, ...]) -> str:
        """`[0-1]`, or nothing when the run has one rank only."""
        return label_of(ranks) if len(self._ranks) > 1 else ""

    def _show(self, blocks: Joiner, items: list[_Item], now: float) -> None:
        ranks = tuple(item.rank for item in items)
        item = items[0]
        if item.key[0] == "clear_output":
            self._clear(blocks, ranks, item)
        elif item.record is not None:
            self._show_rich(blocks, ranks, items)
        else:
            for line in item.line.split("\n"):
                self._show_line(blocks, ranks, item.key[0], line, now)

    def _show_line(self, blocks: Joiner, ranks: tuple[int, ...], kind: str, line: str, now: float) -> None:
        whole = tuple(rank for rank in ranks if not self._ranks[rank].is_cut)
        text = self._labelled(whole, line)
        remaining = self._text.remaining_for(whole, self.ranks)
        if whole and saved_size(text) < remaining:
            self._put_line(blocks, whole, kind, text)
        elif whole:
            if min(remaining, len(text)) > _CUT_WIDTH:
                fraction = remaining / saved_size(text)
                self._put_line(blocks, whole, kind, text[: int(fraction * len(text)) - 2] + "…")
            self._say_full(blocks)
        for rank in ranks:
            if rank not in whole or saved_size(text) >= remaining:
                self._cut(rank, kind, line, now)

    def _cut(self, rank: int, kind: str, line: str, now: float) -> None:
        """A line that there is no room for; from here on nothing of its rank is shown but the end."""
        state = self._ranks[rank]
        state.is_cut = True
        state.tail.add_line(kind, line, now)
        self._passing.touch((rank, kind), state.tail, now)

    def _leave_out(self, rank: int, kind: str, text: str, now: float) -> None:
        """Text that comes after more than a cell could ever show: it is not even taken apart."""
        state = self._ranks[rank]
        state.tail.add_text(kind, text, now)
        if state.is_cut:
            self._passing.touch((rank, kind), state.tail, now)

    @property
    def num_dropped_lines(self) -> int:
        """How many lines of ranks are in the full log only."""
        return sum(state.tail.num_lines for state in self._ranks.values())

    def _show_tails(self, blocks: Joiner, now: float) -> None:
        """The last lines of every rank of which something was left out, the same ones once; then how much it was."""
        tails = {rank: state.tail for rank, state in self._ranks.items() if state.tail.is_live}
        if not tails:
            return
        limit = min(_TAIL_CHARS, int(_TAIL_FRACTION * self.max_chars) // len(tails))
        groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for rank, tail in tails.items():
            groups.setdefault(tuple(_within(tail.lines(), limit)), []).append(rank)
        left: dict[int, list[int]] = {}
        for lines, ranks in groups.items():
            for rank in ranks:
                if num_left := max(0, tails[rank].num_lines - len(lines)):
                    left.setdefault(num_left, []).append(rank)
            if any(tails[rank].num_lines > len(lines) for rank in ranks):
                blocks.add("stdout", f"{self.label(tuple(ranks))} …\n".lstrip(), tuple(ranks))
            for kind, line in lines:
                blocks.add(kind, self._labelled(tuple(ranks), line) + "\n", tuple(ranks))
        if left or self.num_dropped_rich:
            blocks.add("stdout", f"… left out above: {self._left_out(left)}. All of it: {self.where}\n", self.ranks)

    def _left_out(self, left: dict[int, list[int]]) -> str:
        """`480 lines of each of ranks 0-1, 7 of rank 2`."""
        words = []
        for number, ranks in left.items():
            whose = f" of {'each of ' if len(ranks) > 1 else ''}{name_ranks(ranks)}" if len(self._ranks) > 1 else ""
            words.append(f"{number:,} line{'s' if number != 1 else ''}{whose}")
        if number := self.num_dropped_rich:
            words.append(f"{number:,} display{'s' if number != 1 else ''}")
        return ", ".join(words)

    def _labelled(self, ranks: tuple[int, ...], line: str) -> str:
        line = _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", line)
        label = self.label(ranks)
        if not label:
            return line
        if "\x1b" in line and (colors := _COLORS.findall(line)) and colors[-1] not in (_RESET, "\x1b[m"):
            line += _RESET  # the next line is another rank's
        return f"{label} {line}" if line else label

    def _put_line(self, blocks: Joiner, ranks: tuple[int, ...], kind: str, text: str) -> None:
        self._text.take(ranks, saved_size(text) + (_SAVED_BLOCK if kind != self._last_kind else 0))
        self._last_kind = kind
        if kind == "stdout":
            text = self._passing.over(text)
        else:
            self._passing.erase(blocks)
        blocks.add(kind, text + "\n", ranks)

    def _show_rich(self, blocks: Joiner, ranks: tuple[int, ...], items: list[_Item]) -> None:
        record = items[0].record or {}
        kind = str(record.get("kind", "display"))
        size = sum(len(str(value)) for value in (record.get("data") or {}).values())
        if kind != "error":
            if size > self._rich.remaining:
                self.num_dropped_rich += 1
                self._say_full(blocks)
                return
            if not record.get("update"):  # an update replaces what was there: the cell does not grow
                self._rich.take(ranks, size)
        self._passing.erase(blocks)
        self._last_kind = ""
        ids = {
            item.rank: str(item.record["display_id"]) for item in items if item.record and "display_id" in item.record
        }
        label = self.label(ranks)
        blocks.add_rich(Block(kind, as_text(label, record), ranks, label, record, display_ids=ids))

    def _clear(self, blocks: Joiner, ranks: tuple[int, ...], item: _Item) -> None:
        self._passing.erase(blocks)
        for budget in (self._text, self._rich):
            budget.clear(set(ranks))
        for rank in ranks:
            self._ranks[rank].is_cut = False
            self._ranks[rank].tail.clear()
        if self._text.used < self.max_chars / 2 and self._rich.used < MAX_RICH_CHARS / 2:
            self._is_full = False
        blocks.add_rich(Block("clear_output", "", ranks, record=item.record))

    def _say_full(self, blocks: Joiner) -> None:
        if not self._is_full:
            self._is_full = True
            self._passing.erase(blocks)
            self._passing.slow_down(_LAST_LINE_CHARS)
            blocks.add("stdout", f"… further output is in the full log: {self.where}\n", self.ranks)


def _within(lines: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """The last of these lines, as many as take no more than `limit` in a notebook's file."""
    size, kept = 0, deque[tuple[str, str]]()
    for kind, line in reversed(lines):
        size += saved_size(line) + _SAVED_LINE
        if size > limit:
            break
        kept.appendleft((kind, line))
    return list(kept)
