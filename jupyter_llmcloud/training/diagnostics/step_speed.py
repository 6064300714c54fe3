"""What a rank needs for its rows, step by step, and of what kind its losses are."""

from __future__ import annotations

import time
from typing import Any

import torch

EVERY = 8  # steps between two exchanges of what was measured
WARM_UP = 2  # steps that are not measured
MAX_ROUNDING = 1e-5  # of counts, which torch keeps in single precision
_FADES = 0.9


class StepMeasures:
    """What was measured since an optimizer stepped, or since an exchange.

    Attributes:
        seconds, rows: of this rank.
        num_batches: of the last step.
        passes: from which they came.
        is_mixed: whether a step took batches of several passes.
        is_uneven: whether ranks had different numbers of rows.
        has_sums: whether one of its losses is a sum over rows.
        num_items: over all ranks, as a Trainer has counted them for its losses; else None.
        last_rows: of this rank, in the batch that was handed out last.
        last_count: targets a row of the last loss; a number, or a tensor that is not read yet: a GPU is not waited for.
        sum_of_counts: of all losses, as one number in which none makes up for another, for all ranks to compare.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.rows = 0
        self.num_batches = 0
        self.passes: set[int] = set()
        self.is_mixed = self.is_uneven = self.has_sums = False
        self.num_items: torch.Tensor | None = None
        self.last_rows = 0
        self.last_count: Any = 0.0
        self.sum_of_counts: Any = 0.0

    def add(self, step: StepMeasures) -> None:
        """One more step."""
        self.seconds += step.seconds
        self.rows += step.rows
        self.num_batches = step.num_batches
        self.is_mixed |= len(step.passes) > 1
        self.has_sums |= step.has_sums
        self.note_count(step.sum_of_counts)

    def note_count(self, count: Any) -> None:
        """One more loss is a mean over so many targets a row."""
        self.last_count = count
        self.sum_of_counts = _FADES * self.sum_of_counts + count

    @property
    def is_unlike(self) -> bool:
        """Whether rows of this rank have, for certain, unlike numbers of targets."""
        count = float(self.last_count)
        return abs(count - round(count)) > MAX_ROUNDING * count


class StepSpeed:
    """What this rank needs for its rows, step by step.

    Attributes:
        window: since the last exchange.
        step: since an optimizer stepped.
        num_steps: so many times.
    """

    def __init__(self) -> None:
        self.window, self.step = StepMeasures(), StepMeasures()
        self._last_gradient = self._asked = 0.0
        self.num_steps = 0
        self._has_gradients = False

    def asks(self) -> None:
        """A batch is about to be handed out."""
        self._count_time()
        self._asked = time.perf_counter()

    def note_gradient(self) -> None:
        """A gradient is there."""
        self._last_gradient = time.perf_counter()
        self._has_gradients = True

    def backward_ended(self) -> None:
        """Gradients are there, and exchanged: what was waited for that is no time of this rank's."""
        self._count_time()

    def waited(self, seconds: float) -> None:
        """For others, outside of a backward pass."""
        if self._asked:
            self._asked += seconds

    def _count_time(self) -> None:
        """Up to the last gradient; what comes now counts from here on, if it is followed by another one."""
        if self._asked and self._last_gradient > self._asked:
            self.step.seconds += self._last_gradient - self._asked
        self._asked = time.perf_counter() if self._asked else 0.0

    def next_step(self) -> StepMeasures:
        """An optimizer has stepped; returns that step."""
        self.num_steps += 1
        step, self.step = self.step, StepMeasures()
        return step

    def after_step(self) -> bool:
        """As that, where speed is measured; returns whether the window is to be exchanged."""
        if not self._has_gradients:
            return False
        self._count_time()
        step, self._has_gradients = self.next_step(), False
        if self.num_steps <= WARM_UP:
            return False
        self.window.add(step)
        return (self.num_steps - WARM_UP) % EVERY == 0
