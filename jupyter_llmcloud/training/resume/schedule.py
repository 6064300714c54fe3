"""When a checkpoint of a cell is due: every so many steps, when the agent asks for one, when the cell does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SaveRequest:
    """A checkpoint that is to be saved at the end of the present iteration.

    Attributes:
        waits: for the one before to be written; else it is left out meanwhile.
        metric, mode: by which the best checkpoint is kept ("min" or "max").
        is_held: it is not written, but held in memory until the next step.
    """

    waits: bool = False
    metric: float | None = None
    mode: str = "min"
    is_held: bool = False


class CheckpointSchedule:
    """Counts in optimizer steps of the cell.

    Args:
        every: a periodic checkpoint is due after so many steps; 0: none is.
        is_asked_by_cell: the cell itself may ask for one at any time.

    Attributes:
        asked_at: the agent has asked for one after this step; -1: it has not.
        has_warned: it was said that the cell is followed nowhere.
    """

    def __init__(self, every: int = 0, is_asked_by_cell: bool = False) -> None:
        self._every = every
        self._is_open = is_asked_by_cell  # one may come at any time
        self.asked_at = -1
        self.has_warned = False
        self._most_steps = 1  # between two batches
        self._steps_before = 0

    def ask_at(self, step: int) -> None:
        """The agent asks for a checkpoint when this many steps are finished; called in the side thread. -1: not."""
        self.asked_at = step
        self._is_open = self._is_open or step >= 0

    def note_late(self) -> None:
        """One comes later than it was due."""
        self._is_open = True

    def due(self, step: int) -> SaveRequest | None:
        """The checkpoint that is due after this step."""
        if 0 <= self.asked_at <= step:
            self.asked_at = -1
            return SaveRequest(waits=True)
        if self._every and step % self._every == 0:
            return SaveRequest()
        return None

    def is_soon(self, step: int) -> bool:
        """Whether a checkpoint may be saved before the next batch but one; asked once a batch."""
        if self._is_open or not self._every:
            return self._is_open
        self._most_steps = max(self._most_steps, step - self._steps_before)
        self._steps_before = step
        return step % self._every + 2 * self._most_steps >= self._every
