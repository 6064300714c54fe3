"""In which order the rows of a data set come in an epoch: each once, known at any place without the places before."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

_MASK = (1 << 64) - 1
_ROUNDS = 4


def mix(*values: int) -> int:
    """64 bits that depend on every bit of these numbers (the finalizer of SplitMix64)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Permutation:
    """A shuffle of 0 .. `size` - 1 that is computed place by place, in constant memory.

    A Feistel network over the smallest square of a power of two that holds `size`; what falls outside is sent through
    again until it falls inside (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._bits = max(1, -(-max(1, size - 1).bit_length() // 2))
        self._low = (1 << self._bits) - 1
        self._keys = [mix(seed, number) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.size:
            raise IndexError(place)
        value = self._once(place)
        while value >= self.size:
            value = self._once(value)
        return value

    def _once(self, value: int) -> int:
        left, right = value >> self._bits, value & self._low
        for key in self._keys:
            left, right = right, left ^ (mix(key, right) & self._low)
        return (left << self._bits) | right


class RowOrder(Protocol):
    """Which row comes at each place of an epoch."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def __getitem__(self, place: int, /) -> int:
        """The row at a place."""


def shuffled(num_rows: int, seed: int, epoch: int) -> RowOrder:
    """All rows, shuffled over the whole data set, otherwise in each epoch."""
    return Permutation(num_rows, mix(seed, epoch))


class WindowOrder:
    """For data larger than memory: groups of rows in random order, and rows shuffled within `window` groups at a time.

    Whoever reads in this order holds no more than two windows.

    Args:
        groups: how many rows each group has, in the order of the data set.
    """

    def __init__(self, groups: Sequence[int], window: int, seed: int, epoch: int) -> None:
        seed = mix(seed, epoch, 1)
        self._starts = [0, *accumulate(groups)]
        order = Permutation(len(groups), seed)
        self._order = [order[place] for place in range(len(groups))]
        self._ends = [0, *accumulate(groups[group] for group in self._order)]
        bounds = [*range(0, len(groups), max(1, window)), len(groups)]
        self._windows = [self._ends[bound] for bound in bounds]
        sizes = zip(self._windows, self._windows[1:], strict=False)
        self._within = [Permutation(end - start, mix(seed, number, 2)) for number, (start, end) in enumerate(sizes)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < len(self):
            raise IndexError(place)
        window = bisect_right(self._windows, place) - 1
        start = self._windows[window]
        there = start + self._within[window][place - start]
        group = bisect_right(self._ends, there) - 1
        row: int = self._starts[self._order[group]] + there - self._ends[group]
        return row
