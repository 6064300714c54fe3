"""What becomes of the rows that a lost worker had still to train on: the others share them, each row once.

A pass over a loader has phases. In phase 0 every worker has the batches it would have had anyway; each later one cuts
what workers that were lost have left, over those that came to the end of the phase before. Everybody computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Batches = list[list[Any]]
Place = tuple[int, int]  # a phase, and how many of its batches are trained


def divide(batches: Sequence[Sequence[Any]], num_takers: int) -> list[Batches]:
    """The batches of each of those who share these: every row once, in as many steps for all, none larger than before.

    Only where there are fewer rows than takers, some get nothing.
    """
    rows = [row for batch in batches for row in batch]
    if not rows:
        return [[] for _ in range(num_takers)]
    steps = -(-len(rows) // (max(map(len, batches)) * num_takers))
    num = min(len(rows), steps * num_takers)
    parts = [rows[len(rows) * at // num : len(rows) * (at + 1) // num] for at in range(num)]
    return [parts[taker::num_takers] for taker in range(num_takers)]


class PassRows:
    """The batches of all workers in one pass.

    Args:
        first: what a worker has in phase 0.
    """

    def __init__(self, first: Callable[[int], Batches]) -> None:
        self._first = first
        self._later: list[dict[int, Batches]] = []

    def take_over(self, left: dict[int, Place], takers: Sequence[int], worker: int) -> Batches:
        """The next phase begins, of what the workers `left` have left; returns what is for this worker."""
        batches = [batch for lost, place in sorted(left.items()) for batch in self._after(lost, place)]
        parts = dict(zip(sorted(takers), divide(batches, len(takers)), strict=True))
        self._later.append(parts)
        return parts.get(worker, [])

    def _after(self, worker: int, place: Place) -> Batches:
        """Everything that was for a worker, from a place on."""
        phase, num_trained = place
        rest = [batch for number in range(phase, len(self._later) + 1) for batch in self._of(worker, number)]
        return rest[num_trained:]

    def _of(self, worker: int, phase: int) -> Batches:
        return self._later[phase - 1].get(worker, []) if phase else self._first(worker)


@dataclass
class PassEnds:
    """Who waits at the end of which phase, what lost workers have left there, and who takes it over.

    A pass is named by its key, which is the same for all workers.
    """

    _trained: dict[tuple[int, str], dict[int, Place]] = field(default_factory=dict)  # by worker and key: by model
    _at: dict[int, tuple[str, int]] = field(default_factory=dict)  # the phase at whose end a worker was last
    _arrived: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    _answers: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    _given: set[tuple[int, str]] = field(default_factory=set)  # what lost workers have left of which pass is given out
    _num_meetings: dict[int, int] = field(default_factory=dict)

    def note(self, worker: int, model: int, key: str, place: Place) -> None:
        """What a worker has trained of a pass, with one of its models, has come."""
        self._trained.setdefault((worker, key), {})[model] = place

    def arrive(self, worker: int, key: str, phase: int, num_meetings: int) -> None:
        """A worker has come to the end of a phase."""
        self._arrived.setdefault((key, phase), set()).add(worker)
        self._at[worker] = (key, phase)
        self._num_meetings[worker] = num_meetings

    def is_waiting(self, worker: int) -> bool:
        """Whether a worker waits at the end of a phase."""
        return worker in self._at and self._at[worker] not in self._answers

    def settle(self, key: str, phase: int, training: Iterable[int], lost: Iterable[int]) -> bool:
        """Whether those who wait there may go on, since all are there who train and do not wait elsewhere."""
        name = (key, phase)
        if name in self._answers:
            return True
        there = self._arrived[name]
        if any(worker not in there and not self.is_waiting(worker) for worker in training):
            return False
        fresh = [worker for worker in lost if (worker, key) not in self._given]
        self._given.update((worker, key) for worker in fresh)
        self._answers[name] = {
            "takers": sorted(there & set(training)),
            "left": {str(worker): list(self._place(worker, key)) for worker in fresh},
            "num_meetings": max(self._num_meetings[worker] for worker in there),
        }
        return True

    def answer(self, key: str, phase: int) -> dict[str, Any]:
        """Who is there; the places of those that were lost since the phase before; meetings of who had most."""
        return self._answers[key, phase]

    def _place(self, worker: int, key: str) -> Place:
        """All models were trained on what comes before."""
        return min(self._trained.get((worker, key), {0: (0, 0)}).values())
