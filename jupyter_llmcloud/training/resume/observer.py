"""Who is asked and told while the cursor follows a cell: one protocol, which the checkpointer carries out."""

from __future__ import annotations

from typing import Any, Protocol


class CellObserver(Protocol):
    """Knows what to save of a cell; the cursor knows where and when."""

    def save(self, position: dict[str, Any], complete: bool = True) -> bool:
        """The cell is at a place to save. Returns False to be called again at the end of the next iteration."""

    def restore(self) -> None:
        """The cell is at the saved place: put back what was saved there."""

    def is_soon(self) -> bool:
        """Whether the place may be saved at the end of this iteration; asked once a batch."""

    def where(self) -> list[tuple[str, str]]:
        """Which functions of the cell run, and where in their code they are."""

    def begun_pass(self) -> None:
        """A pass over a loader begins."""

    def went_on(self) -> None:
        """A pass that was under way beside the saved place is drawn from again."""
