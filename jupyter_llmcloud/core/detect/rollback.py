"""Going back after an alert: to which checkpoint a run goes, and which of its optimizer steps it leaves out then.

A value that is logged when `n` steps are finished tells of the batch of step n or of step n + 1, as the loop logs after
its step or before. So between the last good value (at `good` steps) and the bad one (at `seen`), the steps from
good + 1 to seen + 1 are under suspicion, and a checkpoint of `good` steps at most is from before them. The run goes
back to the newest such checkpoint, trains once more what was good, and leaves out the steps under suspicion: the cell
draws their batches and computes with them, but no weight changes (as PaLM was trained past its spikes, Chowdhery et al.
2022, section 5.1, where batches were skipped as well).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_IN_A_ROW = 3  # then it is no batch that is at fault
APART = 100  # steps after those that were left out, in which the next alert says that leaving them out did not help


@dataclass(frozen=True)
class Rollback:
    """What is to be done.

    Attributes:
        why: in words.
        before: the newest checkpoint of at most so many steps is gone back to.
        last: the last step that is left out.
        is_repeated: the rollback before this one did not help: everything since the checkpoint is left out.
    """

    why: str
    before: int
    last: int
    is_repeated: bool = False

    def left_out(self, step: int | None) -> tuple[int, int]:
        """The first and the last step that are left out, once the `step` of the checkpoint is known; None: the start.

        From its start a run leaves out no more than what is under suspicion: all of it would leave nothing.
        """
        return (step if self.is_repeated and step is not None else self.before) + 1, self.last


class RollbackRule:
    """Decides for one run, which is not to go back and forth for ever.

    Args:
        left_out: what it leaves out already, as first and last steps.
    """

    def __init__(self, left_out: Iterable[Sequence[int]] = ()) -> None:
        self._last = max((window[1] for window in left_out), default=-1)
        self._in_a_row = 0

    @property
    def last(self) -> int:
        """The last step that is left out so far; what is logged until then has been seen. -1 for none."""
        return self._last

    def decide(self, why: str, good: int, seen: int) -> Rollback | None:
        """Where to go back to; None when that was tried MAX_IN_A_ROW times in a row."""
        good = max(0, min(good, seen - 1))
        is_repeated = self._last >= 0 and good <= self._last + APART
        self._in_a_row = self._in_a_row + 1 if is_repeated else 1
        if self._in_a_row > MAX_IN_A_ROW:
            return None
        self._last = max(self._last, seen + 1)
        return Rollback(why, good, seen + 1, is_repeated)
