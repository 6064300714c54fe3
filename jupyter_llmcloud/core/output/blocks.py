"""What is to be shown of the ranks' output, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.names import format_ranks


@dataclass(frozen=True)
class Block:
    """Something to show, in order.

    `kind` is "stdout" or "stderr" (write `text` as it is to that stream), or the kind of a rich record:
    "display", "result", "error". Then `record` is to be shown, under `label` when that is not empty, and
    `text` stands in for it where only text can be shown; `display_ids` says by which id each rank will update
    it. A `passing` block rewrites itself with carriage returns. A "clear_output" block takes back all that was
    shown of its ranks: at once, or when more of them is shown if its record says `wait`.
    """

    kind: str
    text: str
    ranks: tuple[int, ...] = ()
    label: str = ""
    record: Mapping[str, Any] | None = None
    passing: bool = False
    display_ids: Mapping[int, str] = field(default_factory=dict)


def label_of(ranks: tuple[int, ...]) -> str:
    """`[0-1]`."""
    return f"[{format_ranks(list(ranks))}]"


class Joiner:
    """Joins neighbouring text of the same stream and ranks to one block."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._head: tuple[str, tuple[int, ...], bool] | None = None
        self._parts: list[str] = []

    def add(self, kind: str, text: str, ranks: tuple[int, ...], passing: bool = False) -> None:
        """Text of a stream."""
        head = (kind, ranks, passing)
        if head != self._head:
            self._end()
            self._head = head
        self._parts.append(text)

    def add_rich(self, block: Block) -> None:
        """A rich record."""
        self._end()
        self._blocks.append(block)

    def finish(self) -> list[Block]:
        """Everything that was added."""
        self._end()
        return self._blocks

    def _end(self) -> None:
        if self._head is not None:
            kind, ranks, passing = self._head
            self._blocks.append(Block(kind, "".join(self._parts), ranks, passing=passing))
        self._head, self._parts = None, []


def as_text(label: str, record: Mapping[str, Any]) -> str:
    """The lines that stand in for a rich record."""
    text = str((record.get("data") or {}).get("text/plain", ""))
    if not text:
        return ""
    return "".join(f"{label} {line}\n" if label else f"{line}\n" for line in text.split("\n"))
