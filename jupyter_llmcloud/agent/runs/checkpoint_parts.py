"""Which parts that ranks have saved make one checkpoint: those of the same step.

A rank that was asked too late saves a later step than the others, or nothing. The parts of each rank come in the order
of their steps, so what a rank has passed without a part for it will never be whole.
"""

from __future__ import annotations

from collections.abc import Iterable

from jupyter_llmcloud.protocol.rank_messages import CheckpointPart

Parts = dict[int, CheckpointPart]  # by rank


class CheckpointParts:
    """The parts of one attempt that are not yet a checkpoint.

    Args:
        ranks: whose parts make one.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._ranks = set(ranks)
        self._waiting: dict[tuple[int, int], Parts] = {}  # by step, and which try of that step it is
        self._newest: dict[int, tuple[int, int]] = {}  # by rank
        self._of_left: dict[tuple[int, tuple[int, ...]], Parts] = {}  # by step, and who is left

    def add_of_left(self, rank: int, part: CheckpointPart) -> Parts | None:
        """A part of a checkpoint that those ranks write that are left; returns all of them with the last one."""
        parts = self._of_left.setdefault((part.step, tuple(part.left)), {})
        parts[rank] = part
        return parts if set(parts) == set(part.left) else None

    def without(self, rank: int) -> None:
        """A rank is lost, and the others go on: their parts make a checkpoint."""
        self._ranks.discard(rank)

    def add(self, rank: int, part: CheckpointPart) -> tuple[Parts | None, list[Parts]]:
        """Returns the parts of all ranks where this was the last one, and those that can never be all."""
        key = (part.step, part.serial)
        self._newest[rank] = max(key, self._newest.get(rank, key))
        parts = self._waiting.setdefault(key, {})
        parts[rank] = part
        whole = self._waiting.pop(key) if set(parts) >= self._ranks else None
        passed = [key for key, parts in self._waiting.items() if self._is_passed(key, parts)]
        return whole, [self._waiting.pop(key) for key in sorted(passed)]

    def _is_passed(self, key: tuple[int, int], parts: Parts) -> bool:
        return any(self._newest.get(rank, key) > key for rank in self._ranks - set(parts))
