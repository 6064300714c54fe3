"""Keys and values in slots. Slots of one capacity are one tensor, so that attention reads them without a copy.

A group's rows are kept dense: those that are decoded come first, those whose prompt is still read come after them. A
sequence that outgrows its slot moves to a group of twice the capacity; a group grows and shrinks by rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch

BLOCK = 32
SMALLEST = 128
_MOST_SEEN = 8


class LayerShape(NamedTuple):
    """The keys of one layer; its values have the same shape."""

    num_heads: int
    head_size: int


class Occupant(Protocol):
    """Who may have a slot.

    Attributes:
        group, row: the slot; None while there is none.
        num_cached: the first so many places of it hold something.
    """

    group: SlotGroup | None
    row: int
    num_cached: int


class CacheFull(Exception):
    """The budget holds no further slot."""


class SlotGroup:
    """All slots of one capacity.

    Attributes:
        capacity: tokens of a slot.
        layers: of each layer the keys and values: [rows, capacity, 2 * heads, head size]. What a token has stands
            together, so that it is written at once.
        sequences: who has each row, in order.
        num_decoding: so many of them, from the first on, take one token a step.
    """

    def __init__(self, shapes: list[LayerShape], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.layers = [
            torch.zeros(0, capacity, 2 * shape.num_heads, shape.head_size, dtype=dtype, device=device)
            for shape in shapes
        ]
        self.sequences: list[Occupant] = []
        self.num_decoding = 0
        self._seen: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def num_rows(self) -> int:
        """Rows that are allocated."""
        return self.layers[0].shape[0]

    @property
    def bytes_per_row(self) -> int:
        """What a slot takes."""
        return sum(layer.stride(0) * layer.itemsize for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """What all of its slots take."""
        return self.num_rows * self.bytes_per_row

    def resize(self, num_rows: int) -> None:
        """Allocate so many rows; those in use stay as they are."""
        self._seen.clear()
        for index, layer in enumerate(self.layers):
            larger = _zeros((num_rows, *layer.shape[1:]), layer.dtype, layer.device)
            for row, sequence in enumerate(self.sequences):
                larger[row, : sequence.num_cached] = layer[row, : sequence.num_cached]
            self.layers[index] = larger

    def seen(self, num_rows: int, longest: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer the keys and the values of the first rows and positions: [rows, heads, positions, size]."""
        if (found := self._seen.get((num_rows, longest))) is None:
            found = self._seen[num_rows, longest] = [
                (both[:, :, :half].transpose(1, 2), both[:, :, half:].transpose(1, 2))
                for both, half in ((layer[:num_rows, :longest], layer.shape[2] // 2) for layer in self.layers)
            ]
            if len(self._seen) > _MOST_SEEN:
                self._seen.pop(next(iter(self._seen)))
        return found

    def add(self, sequence: Occupant) -> None:
        """Give the sequence a row; there must be a free one."""
        sequence.group, sequence.row = self, len(self.sequences)
        self.sequences.append(sequence)

    def begin_decoding(self, sequence: Occupant) -> None:
        """Its prompt was read: move it to those that are decoded."""
        self._swap(sequence.row, self.num_decoding)
        self.num_decoding += 1

    def remove(self, sequence: Occupant) -> None:
        """Give its row back and close the hole."""
        hole = sequence.row
        if hole < self.num_decoding:
            self.num_decoding -= 1
            self._move(self.num_decoding, hole)
            hole = self.num_decoding
        self._move(len(self.sequences) - 1, hole)
        self.sequences.pop()
        sequence.group, sequence.row = None, -1

    def scrub(self) -> None:
        """Let no place that no sequence has hold NaN or an infinity: attention multiplies what it does not see by 0."""
        for row in range(self.num_rows):
            begin = self.sequences[row].num_cached if row < len(self.sequences) else 0
            for layer in self.layers:
                left = layer[row, begin:]
                left.masked_fill_(~left.isfinite(), 0.0)

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        moved = self.sequences[source]
        for layer in self.layers:
            layer[target, : moved.num_cached].copy_(layer[source, : moved.num_cached])
        self.sequences[target], moved.row = moved, target

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        first, second = self.sequences[one], self.sequences[other]
        length = max(first.num_cached, second.num_cached)
        for layer in self.layers:
            kept = layer[one, :length].clone()
            layer[one, :length] = layer[other, :length]
            layer[other, :length] = kept
        self.sequences[one], self.sequences[other] = second, first
        first.row, second.row = other, one


class KVSlots:
    """Every slot there is, within a budget of bytes.

    Attributes:
        budget: bytes that slots and retained prefixes may take together.
        reserved: bytes of the budget that others have taken: see PrefixStore.
        groups: by capacity.
    """

    def __init__(
        self, shapes: list[LayerShape], longest: int, budget: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = shapes
        self.budget = budget
        self.reserved = 0
        self.groups: dict[int, SlotGroup] = {}
        self._longest = -(-longest // BLOCK) * BLOCK
        self._dtype = dtype
        self._device = device

    @property
    def bytes_per_token(self) -> int:
        """What a token's keys and values take."""
        return sum(2 * shape.num_heads * shape.head_size for shape in self.shapes) * self._dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """What is allocated for slots."""
        return sum(group.num_bytes for group in self.groups.values())

    @property
    def num_tokens(self) -> int:
        """How many tokens the slots hold."""
        return sum(group.num_rows * group.capacity for group in self.groups.values())

    def place(self, sequence: Occupant, num_tokens: int) -> None:
        """A slot for a sequence that has none; raises CacheFull."""
        self._group_with_free_row(num_tokens).add(sequence)

    def grow(self, sequence: Occupant, num_tokens: int) -> None:
        """Move a sequence to a slot that holds so many tokens; raises CacheFull, and leaves it where it was."""
        before, row = sequence.group, sequence.row
        assert before is not None
        if num_tokens <= before.capacity:
            return
        larger = self._group_with_free_row(num_tokens)
        was_decoding = row < before.num_decoding
        target = len(larger.sequences)
        for old, new in zip(before.layers, larger.layers, strict=True):
            new[target, : sequence.num_cached].copy_(old[row, : sequence.num_cached])
        self.free(sequence)
        larger.add(sequence)
        if was_decoding:
            larger.begin_decoding(sequence)

    def free(self, sequence: Occupant) -> None:
        """Give its slot back."""
        if (group := sequence.group) is not None:
            group.remove(sequence)

    def scrub(self) -> None:
        """As of each group."""
        for group in self.groups.values():
            group.scrub()

    def trim(self) -> None:
        """Give back what no sequence has."""
        self._take_back(None)

    @property
    def _free(self) -> int:
        """Bytes of the budget that nobody has."""
        return self.budget - self.reserved - self.num_bytes

    def _take_back(self, needed: SlotGroup | None) -> None:
        """From groups the rows that no sequence has, and the groups that have none; not the one that needs more."""
        for capacity, group in list(self.groups.items()):
            if group is needed:
                continue
            if not group.sequences:
                del self.groups[capacity]
            elif len(group.sequences) < group.num_rows:
                group.resize(len(group.sequences))

    def capacity_for(self, num_tokens: int) -> int:
        """The capacity of the slot that so many tokens need."""
        capacity = SMALLEST
        while capacity < num_tokens:
            capacity *= 2
        return min(capacity, self._longest)

    def _group_with_free_row(self, num_tokens: int) -> SlotGroup:
        capacity = self.capacity_for(num_tokens)
        group = self.groups.get(capacity)
        if group is None:
            group = self.groups[capacity] = SlotGroup(self.shapes, capacity, self._dtype, self._device)
        used = len(group.sequences)
        if used == group.num_rows:
            more = min(max(1, used), self._free // group.bytes_per_row)
            if more < 1:
                self._take_back(group)
                more = min(1, self._free // group.bytes_per_row)
            if more < 1:
                raise CacheFull
            group.resize(used + more)
        return group


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take memory only where something is written: attention reads places beyond the end of a sequence."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    # numpy asks the operating system for pages that are zero; torch would write every one of them.
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
