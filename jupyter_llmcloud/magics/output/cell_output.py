"""What a run shows below its cell, kept so that ranks can take back or replace what is theirs.

A notebook can clear only everything below a cell. So what one rank clears is taken out of the page, and the rest
is shown again; where displays are followed by as many others they are replaced in place, which nobody notices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from jupyter_llmcloud.core.output.blocks import Block, label_of

REPAINT_EVERY_S = 0.2
MAX_WAIT_S = 2.0
_CHARS_PER_S = 500_000  # how fast a page is shown again and again
_UPDATE_EVERY_S = 0.1
_MAX_SHOWN = 10_000


class OutputArea(Protocol):
    """Where a page is shown."""

    def write(self, kind: str, text: str) -> None:
        """Text to stdout or stderr."""

    def show(self, data: Mapping[str, Any], metadata: Mapping[str, Any], display_id: str, update: bool) -> None:
        """A mime bundle; with `update`, in place of the one shown under the same id."""

    def clear(self, wait: bool) -> None:
        """Remove everything; with `wait`, when something else is shown."""


@dataclass(eq=False)
class OutputEntry:
    """A stretch of text, a display, or (without a block) the live view."""

    ranks: set[int]
    block: Block | None
    display_id: str = ""
    is_new: bool = False  # it has been updated, but what is shown is older
    shown_at: float = 0.0

    @property
    def size(self) -> int:
        """Characters that it takes in the notebook."""
        if self.block is None:
            return 0
        data = (self.block.record or {}).get("data") or {}
        return len(self.block.text) + sum(len(str(value)) for value in data.values())


_shown: dict[tuple[int, str], str] = {}  # displays of this kernel by rank and id there: a later cell may update them


class CellOutput:
    """Time is an argument: any clock going forward.

    Args:
        name: what the ids of its displays begin with.
        show_view: shows the live view (again).
        has_labels: whether displays say whose they are.
        can_clear: whether the area can; a terminal cannot.
    """

    def __init__(
        self,
        name: str,
        area: OutputArea,
        show_view: Callable[[], None],
        *,
        has_labels: bool = True,
        can_clear: bool = True,
    ) -> None:
        self.entries: list[OutputEntry] = []
        self._ids = (f"{name}/{number}" for number in itertools.count(1))
        self._area = area
        self._show_view = show_view
        self._has_labels = has_labels
        self._can_clear = can_clear
        self._by_id: dict[tuple[int, str], OutputEntry] = {}
        self._clearing: set[int] = set()
        self._held: list[Block] = []  # what comes after a clear, and after it whatever comes
        self._is_stale = False  # what is shown is not what the entries say
        self._at_once = False
        self._repainted_at = float("-inf")

    # --- what happens ---

    def add_view(self) -> None:
        """The live view has been shown."""
        self.entries.append(OutputEntry(set(), None))

    def add(self, blocks: Iterable[Block], now: float) -> None:
        """Show blocks, or hold them until their time comes."""
        for block in blocks:
            if block.kind == "clear_output":
                self._clear(set(block.ranks), bool((block.record or {}).get("wait")))
            elif not self._held and not self._clearing & set(block.ranks):
                self._put(block, now)
            elif not block.passing:
                self._held.append(block)
            else:
                self._at_once = True
        self.tick(now)

    def tick(self, now: float) -> None:
        """Do what is due."""
        if (due := self._repaint_due) is not None and now >= due:
            self._repaint(now)
        for entry in self._updated():
            if now >= entry.shown_at + _UPDATE_EVERY_S:
                self._show(entry, now, update=True)

    def next_deadline(self) -> float | None:
        """When `tick` will have something to do."""
        times = [entry.shown_at + _UPDATE_EVERY_S for entry in self._updated()]
        if (due := self._repaint_due) is not None:
            times.append(due)
        return min(times, default=None)

    def finish(self, now: float) -> None:
        """Nothing more comes: show what was held."""
        if self._repaint_due is not None:
            self._repaint(now)
        for entry in self._updated():
            self._show(entry, now, update=True)

    def _updated(self) -> list[OutputEntry]:
        return [entry for entry in self._by_id.values() if entry.is_new] if self._by_id else []

    # --- taking back ---

    @property
    def _repaint_due(self) -> float | None:
        if not (self._held or self._is_stale or (self._clearing and self._at_once)):
            return None
        left = sum(entry.size for entry in self.entries if not self._goes(entry))
        return self._repainted_at + min(MAX_WAIT_S, max(REPAINT_EVERY_S, left / _CHARS_PER_S))

    def _goes(self, entry: OutputEntry) -> bool:
        return bool(entry.ranks) and entry.ranks <= self._clearing

    def _clear(self, ranks: set[int], wait: bool) -> None:
        if not self._can_clear:
            return
        self._held = [block for block in self._held if not set(block.ranks) <= ranks]
        self._clearing |= ranks
        self._at_once = self._at_once or not wait

    def _repaint(self, now: float) -> None:
        """The page without what was cleared, and with what came since."""
        held, self._held = self._held, []
        going = [entry for entry in self.entries if self._goes(entry)]
        gone, self._clearing = self._clearing, set()
        for entry in self.entries:
            entry.ranks -= gone if entry.ranks - gone else set()
        self._at_once, self._repainted_at = False, now
        if not self._is_stale and (blocks := self._replaced(going, held, gone)):
            for entry, block in blocks:
                self._replace(entry, block, now)
            return
        self.entries = [entry for entry in self.entries if entry not in going]
        self._by_id = {key: entry for key, entry in self._by_id.items() if entry in self.entries}
        if going or self._is_stale:
            self._is_stale = False
            self._area.clear(wait=bool(self.entries or held))
            for entry in self.entries:
                self._show(entry, now)
        for block in held:
            self._put(block, now)

    def _replaced(
        self, going: Sequence[OutputEntry], held: Sequence[Block], gone: Set[int]
    ) -> list[tuple[OutputEntry, Block]]:
        """Which displays can take the place of those that go; none when anything else has changed."""
        new = [block for block in held if set(block.ranks) & gone]
        pairs = list(zip(going, new, strict=False))
        fits = len(going) == len(new) == len(held) and all(
            entry.display_id
            and entry.block is not None
            and block.record is not None
            and not block.record.get("update")
            and set(block.ranks) == set(entry.block.ranks)
            for entry, block in pairs
        )
        return pairs if fits else []

    def _replace(self, entry: OutputEntry, block: Block, now: float) -> None:
        self._by_id = {key: other for key, other in self._by_id.items() if other is not entry}
        entry.block, entry.ranks = block, set(block.ranks)
        self._remember(entry)
        self._show(entry, now, update=True)

    # --- showing ---

    def _put(self, block: Block, now: float) -> None:
        if block.record is not None and block.record.get("update"):
            self._update(block)
            return
        if block.passing:
            self._area.write(block.kind, block.text)
            return
        last = self.entries[-1].block if self.entries else None
        if last is not None and block.record is None and (last.kind, last.ranks) == (block.kind, block.ranks):
            self._area.write(block.kind, block.text)
            self.entries[-1].block = Block(block.kind, last.text + block.text.replace("\r", ""), block.ranks)
            return
        if block.record is None:
            self._area.write(block.kind, block.text)
            # What a line in passing was written over with is not written again.
            self.entries.append(
                OutputEntry(set(block.ranks), Block(block.kind, block.text.replace("\r", ""), block.ranks))
            )
            return
        entry = OutputEntry(set(block.ranks), block)
        self.entries.append(entry)
        if not is_text(block):
            entry.display_id = next(self._ids)
            self._remember(entry)
        self._show(entry, now)

    def _remember(self, entry: OutputEntry) -> None:
        assert entry.block is not None
        for rank, name in entry.block.display_ids.items():
            self._by_id[rank, name] = entry
            _shown[rank, name] = entry.display_id
        while len(_shown) > _MAX_SHOWN:
            del _shown[next(iter(_shown))]

    def _show(self, entry: OutputEntry, now: float, update: bool = False) -> None:
        block = entry.block
        entry.is_new, entry.shown_at = False, now
        if block is None:
            self._show_view()
        elif block.record is None:
            self._area.write(block.kind, block.text)
        elif is_text(block):
            self._area.write("stdout", _result(block))
        else:
            if block.label and not update:
                self._area.write("stdout", f"{block.label}\n")
            record = block.record
            self._area.show(record["data"], record.get("metadata") or {}, entry.display_id, update)

    def _update(self, block: Block) -> None:
        """Ranks replace a display of theirs; who does so alone has one of its own from then on."""
        groups: dict[int, tuple[OutputEntry, set[int]]] = {}
        elsewhere: set[str] = set()
        for rank, name in block.display_ids.items():
            entry = self._by_id.get((rank, name))
            if entry is not None:
                groups.setdefault(id(entry), (entry, set()))[1].add(rank)
            elif (known := _shown.get((rank, name))) is not None:
                elsewhere.add(known)
        for entry, ranks in groups.values():
            ids = {rank: block.display_ids[rank] for rank in ranks}
            if entry.ranks <= ranks:
                self._set(entry, block, tuple(sorted(ranks)), ids)
                entry.is_new = True
            else:
                self._split(entry, block, ranks, ids)
        record = block.record or {}
        for display_id in elsewhere:
            self._area.show(record["data"], record.get("metadata") or {}, display_id, update=True)

    def _set(self, entry: OutputEntry, block: Block, ranks: tuple[int, ...], ids: Mapping[int, str]) -> None:
        old = entry.block
        label = label_of(ranks) if self._has_labels else ""
        kind = old.kind if old is not None else block.kind
        record = {**(block.record or {}), "update": False}
        entry.block = Block(kind, block.text, ranks, label, record, display_ids=ids)

    def _split(self, entry: OutputEntry, block: Block, ranks: set[int], ids: Mapping[int, str]) -> None:
        old = entry.block
        assert old is not None
        entry.ranks -= ranks
        own = {rank: name for rank, name in old.display_ids.items() if rank in entry.ranks}
        self._set(entry, old, tuple(sorted(entry.ranks)), own)
        other = OutputEntry(set(ranks), None, next(self._ids))
        self._set(other, block, tuple(sorted(ranks)), ids)
        self.entries.insert(self.entries.index(entry) + (min(ranks) > min(entry.ranks)), other)
        self._remember(other)
        if self._can_clear:
            self._is_stale = True
        else:
            self._show(other, other.shown_at)


def is_text(block: Block) -> bool:
    """A result that is nothing but text is written like one, not displayed."""
    record = block.record or {}
    return record.get("kind") == "result" and set(record.get("data") or ()) <= {"text/plain"}


def _result(block: Block) -> str:
    text = str(((block.record or {}).get("data") or {}).get("text/plain", ""))
    name = f"Out{block.label}" if block.label else "Out"
    return f"{name}: {text}\n" if "\n" not in text else f"{name}:\n{text}\n"
