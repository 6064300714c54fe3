"""The output of many ranks becomes one readable stream: identical lines once, different ones labelled.

Every complete line waits up to `hold_s` for the same line of other ranks. The order of each rank's own output
is always kept. Text that is still being written (a line without its end, a bar that rewrites itself) is shown
as one passing line of one rank, rewritten in place, until it is complete; then it is a line like any other.

A cell shows at most `max_chars`, some of it kept for every rank. Of what a rank writes beyond that the newest line is
shown in passing, and at the end the last lines and how much is left out between.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.names import name_ranks
from jupyter_llmcloud.core.output.blocks import Block, Joiner, as_text, label_of
from jupyter_llmcloud.core.output.budget import CellBudget
from jupyter_llmcloud.core.output.fold_queue import FoldQueue, Item
from jupyter_llmcloud.core.output.live_line import PassingLine
from jupyter_llmcloud.core.output.tail import Tail
from jupyter_llmcloud.core.output.terminal import Screen

MAX_CHARS = 110_000  # as saved, in bytes; with the ends of ranks and the live view's static version that makes 200 kB
_TAIL_FRACTION = 0.2  # of max_chars, on top of them
_TAIL_CHARS = 6_000  # of one rank
_LAST_LINE_CHARS = 12_000  # for the newest line of what is left out, rewritten in place
_CUT_WIDTH = 2_000
_SAVED_LINE = 15  # indentation, quotes, comma
_SAVED_BLOCK = 120  # the names and brackets of an output
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


@dataclass
class _RankOutput:
    """What a rank has written and not yet seen shown."""

    screens: dict[str, Screen] = field(default_factory=dict)
    num_chars: int = 0
    displays: dict[str, int] = field(default_factory=dict)  # by id, in the order of their first appearance
    num_warned: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False  # nothing more of it is shown but its end
    tail: Tail = field(default_factory=Tail)


class OutputFolder:
    """Text and rich records of ranks in, blocks to show out. Time is an argument: any clock going forward.

    Args:
        where: says where the full log is, asked when something is left out.

    Attributes:
        shows_passing: whether lines that are still being written are shown.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        hold_s: float = 0.08,
        max_chars: int = MAX_CHARS,
        *,
        name: str = "",
        where: Callable[[], str] | None = None,
    ) -> None:
        self.ranks = tuple(sorted(set(ranks)))
        self.max_chars = max_chars
        self._where = where or f"%runs logs {name}".rstrip
        self.shows_passing = True
        self._ranks = {rank: _RankOutput() for rank in self.ranks}
        self._queue = FoldQueue(self.ranks, hold_s)
        self._budget = CellBudget(max_chars)
        self._warned: dict[str, int] = {}
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
            return self.flush(now) if now >= self._flushed_at + self._queue.hold_s / 4 else []
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
        self._queue.add(Item(rank, (kind, digest), now, record))
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
        for items in self._queue.ready(now, final):
            self._show(blocks, items, now)
        if final:
            self._passing.erase(blocks)
            self._show_tails(blocks, now)
        elif self.shows_passing:
            self._budget.take_text((), self._passing.show(blocks, self.label, now))
        return blocks.finish()

    @property
    def is_full(self) -> bool:
        """Whether text or displays are left out, since they do not fit."""
        return self._budget.is_full

    @property
    def num_dropped_rich(self) -> int:
        """How many displays are in the full log only."""
        return self._budget.num_dropped_rich

    def next_deadline(self) -> float | None:
        """When `flush` will have something to show, None when nothing waits."""
        starts = [screen.settling_since for screen in self._settling.values()]
        times = [start + self._queue.hold_s for start in starts if start is not None]
        if (due := self._queue.next_deadline()) is not None:
            times.append(due)
        if self.shows_passing and (due := self._passing.due) is not None:
            times.append(due)
        return min(times, default=None)

    # --- taking in -----------------------------------------------------------------------------------------

    def _state(self, rank: int) -> _RankOutput:
        if rank not in self._ranks:  # a rank that joined later (an elastic world)
            self._ranks[rank] = _RankOutput()
            self._queue.add_rank(rank)
            self.ranks = tuple(sorted(self._ranks))
        return self._ranks[rank]

    def _take_line(self, state: _RankOutput, rank: int, kind: str, line: str, now: float) -> None:
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
        self._queue.add(Item(rank, (kind, key), now, None, line))

    def _take_warning(
        self, state: _RankOutput, rank: int, kind: str, text: str, now: float, content: str | None = None
    ) -> None:
        content = text if content is None else content
        number = state.num_warned[content] = state.num_warned.get(content, 0) + 1
        key = (kind, f"\0{number}\0{content}")
        if number <= self._warned.get(content, 0) and not self._queue.has(key):
            return  # another rank has said it
        self._warned[content] = max(number, self._warned.get(content, 0))
        state.num_chars += len(text) + 1
        self._queue.add(Item(rank, key, now, None, text))

    def _close_lines(self, state: _RankOutput, rank: int, now: float) -> None:
        for kind, screen in state.screens.items():
            for line in screen.close():
                self._take_line(state, rank, kind, line, now)

    def _settle(self, now: float) -> None:
        for (rank, kind), screen in list(self._settling.items()):
            since = screen.settling_since
            if since is not None and now - since < self._queue.hold_s:
                continue
            del self._settling[rank, kind]
            for line in screen.settle() if since is not None else ():
                self._take_line(self._ranks[rank], rank, kind, line, now)

    # --- showing -------------------------------------------------------------------------------------------

    def label(self, ranks: tuple[int, ...]) -> str:
        """`[0-1]`, or nothing when the run has one rank only."""
        return label_of(ranks) if len(self._ranks) > 1 else ""

    def _show(self, blocks: Joiner, items: list[Item], now: float) -> None:
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
        remaining = self._budget.remaining_for(whole, self.ranks)
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
        """A line that does not fit; from here on nothing of its rank is shown but the end."""
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
        if left or self._budget.num_dropped_rich:
            blocks.add("stdout", f"… left out above: {self._left_out(left)}. All of it: {self._where()}\n", self.ranks)

    def _left_out(self, left: dict[int, list[int]]) -> str:
        """`480 lines of each of ranks 0-1, 7 of rank 2`."""
        words = []
        for number, ranks in left.items():
            whose = f" of {'each of ' if len(ranks) > 1 else ''}{name_ranks(ranks)}" if len(self._ranks) > 1 else ""
            words.append(f"{number:,} line{'s' if number != 1 else ''}{whose}")
        if number := self._budget.num_dropped_rich:
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
        self._budget.take_text(ranks, saved_size(text) + (_SAVED_BLOCK if kind != self._last_kind else 0))
        self._last_kind = kind
        if kind == "stdout":
            text = self._passing.over(text)
        else:
            self._passing.erase(blocks)
        blocks.add(kind, text + "\n", ranks)

    def _show_rich(self, blocks: Joiner, ranks: tuple[int, ...], items: list[Item]) -> None:
        record = items[0].record or {}
        kind = str(record.get("kind", "display"))
        size = sum(len(str(value)) for value in (record.get("data") or {}).values())
        if kind != "error" and not self._budget.take_rich(ranks, size, bool(record.get("update"))):
            self._say_full(blocks)
            return
        self._passing.erase(blocks)
        self._last_kind = ""
        ids = {
            item.rank: str(item.record["display_id"]) for item in items if item.record and "display_id" in item.record
        }
        label = self.label(ranks)
        blocks.add_rich(Block(kind, as_text(label, record), ranks, label, record, display_ids=ids))

    def _clear(self, blocks: Joiner, ranks: tuple[int, ...], item: Item) -> None:
        self._passing.erase(blocks)
        self._budget.clear(set(ranks))
        for rank in ranks:
            self._ranks[rank].is_cut = False
            self._ranks[rank].tail.clear()
        blocks.add_rich(Block("clear_output", "", ranks, record=item.record))

    def _say_full(self, blocks: Joiner) -> None:
        if not self._budget.is_full:
            self._budget.is_full = True
            self._passing.erase(blocks)
            self._passing.slow_down(_LAST_LINE_CHARS)
            blocks.add("stdout", f"… further output is in the full log: {self._where()}\n", self.ranks)


def _within(lines: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """The last of these lines, as many as take no more than `limit` in a notebook's file."""
    size, kept = 0, deque[tuple[str, str]]()
    for kind, line in reversed(lines):
        size += saved_size(line) + _SAVED_LINE
        if size > limit:
            break
        kept.appendleft((kind, line))
    return list(kept)
