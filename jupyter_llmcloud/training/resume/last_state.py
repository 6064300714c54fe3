"""The state of a rank at the end of its last iteration, held in memory until the next step of an optimizer begins.

When peers are lost with their agents, those that are left write it down, each its part, as a checkpoint of a world of
their own: where all of them hold the same step, the run goes on from there and nothing is trained again. Otherwise it
goes on from the newest checkpoint, as without this. It is taken only where that costs next to nothing beside a step,
which is where steps are long and checkpoints, for what they cost, rare.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.checkpoint.borrower import Borrower
from jupyter_llmcloud.training.resume.cell.state import CellState
from jupyter_llmcloud.training.resume.loaders.iterator import ReplayPosition

SHARE = 0.01  # of the time of a step that taking it may cost
MOST_BYTES = 1 << 30  # a rank that does not end is killed after some seconds: more would not be written by then
TOLD_S, ALL_TOLD_S = 1.0, 0.05  # from the first error until the agent says who is left; until it has said so of all
_FADES = 0.98  # a cost that was too high is looked at again after a while


@dataclass(frozen=True)
class TakenState:
    """What was taken, at the end of which step."""

    step: int
    shared: dict[str, Any]
    own: dict[str, Any]
    ranks: tuple[int, ...] = ()  # those that are left, which write it


class LastState:
    """Of the cell that a rank executes.

    Args:
        state: takes it.
    """

    def __init__(self, state: CellState) -> None:
        self._state = state
        self._told = threading.Event()
        self._stager = Borrower()
        self.clear()

    def clear(self) -> None:
        """No cell is executed, or one that does without."""
        self.is_wanted = False
        if not self._stager.is_new:
            self._stager = Borrower()
        self._taken: TakenState | None = None
        self._cost_s = 0.0
        self._stepped_at = self._step_s = 0.0
        self._left: list[int] = []
        self._told.clear()

    def begin(self, cell: Execute) -> None:
        """A cell begins. Held is the state of replicas: what is cut over the ranks is not whole where one is lost."""
        self.clear()
        self.is_wanted = bool(cell.elastic) and len(cell.ranks) > 1 and (cell.plan or "ddp") == "ddp"

    # --- taking ---

    def is_due(self) -> bool:
        """Whether to take it at the end of this iteration; asked after each step."""
        now, before = time.monotonic(), self._stepped_at
        self._stepped_at = now
        if not self.is_wanted or not before:
            return False
        self._step_s = now - before
        if self._cost_s <= SHARE * self._step_s:
            return True
        self._cost_s *= _FADES
        return False

    @property
    def is_near(self) -> bool:
        """Whether it may be taken at the end of this iteration or the next, as far as is known."""
        return self.is_wanted and self._cost_s <= 2 * SHARE * self._step_s

    def drop(self, *_: object) -> None:
        """A step begins: what was taken is no state of anything any more."""
        self._taken = None

    def take(self, position: ReplayPosition, step: int) -> None:
        """Take it: the cell is at the end of an iteration."""
        self._taken = None
        began = time.perf_counter()
        try:
            shared, own = self._state.take(position, step, self._stager)
        except Exception:
            self.is_wanted = False  # an ordinary checkpoint says why
        else:
            self._taken = TakenState(step, shared or {}, own)
        self._cost_s = time.perf_counter() - began

    # --- giving ---

    def tell(self, left: list[int]) -> None:
        """The agent says who is left; called in the side thread."""
        self._left = left
        self._told.set()

    def note_release(self) -> None:
        """The group is broken: nobody is left who was not told before; called in the side thread."""
        self._told.set()

    def wait(self) -> None:
        """Return when the agent has said who is left, or after a while."""
        if self._taken is not None and self._told.wait(TOLD_S):
            time.sleep(ALL_TOLD_S)  # ranks that are lost with one agent are told one after the other

    def of_those_left(self, step: int, rank: int) -> TakenState | None:
        """What this rank is to write; None where it holds nothing that is whole, or nobody has asked for it."""
        taken, left = self._taken, sorted(self._left)
        if taken is None or taken.step != step or rank not in left or self._stager.num_bytes > MOST_BYTES:
            return None
        if not self._stager.is_untouched():
            return None
        return replace(taken, own={**taken.own, "world_size": len(left)}, ranks=tuple(left))
