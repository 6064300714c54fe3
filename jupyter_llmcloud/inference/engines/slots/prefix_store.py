"""Keys and values of what was read before, in blocks, for prompts that begin alike.

A block is known by a digest of all tokens up to its end, so equal digests mean an equal past. The blocks that were not
used for the longest time go first, when slots need their memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator

import torch

from jupyter_llmcloud.inference.engines.slots.kv_slots import BLOCK, KVSlots
from jupyter_llmcloud.inference.engines.slots.sequence import Sequence


class PrefixStore:
    """Blocks of 32 tokens, by their digests, the latest used last.

    Args:
        slots: whose budget they share.
        max_bytes: of the budget that they may take.
    """

    def __init__(self, slots: KVSlots, max_bytes: int) -> None:
        self._slots = slots
        self._blocks: OrderedDict[bytes, list[torch.Tensor]] = OrderedDict()
        self._max_bytes = max_bytes

    @property
    def bytes_per_block(self) -> int:
        """What one takes."""
        return BLOCK * self._slots.bytes_per_token

    @property
    def num_bytes(self) -> int:
        """What all take."""
        return len(self._blocks) * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        """How many tokens they hold."""
        return len(self._blocks) * BLOCK

    def known(self, tokens: list[int]) -> int:
        """How many tokens from the first on are held. At least one is left to be read: its scores are needed."""
        held = 0
        for end, digest in _digests(tokens[: len(tokens) - 1]):
            if digest not in self._blocks:
                break
            held = end
        return held

    def restore(self, sequence: Sequence) -> None:
        """Put what is held of its tokens into its slot, which is empty."""
        group, row = sequence.group, sequence.row
        assert group is not None
        for end, digest in _digests(sequence.tokens[: len(sequence.tokens) - 1]):
            if (block := self._blocks.get(digest)) is None:
                return
            self._blocks.move_to_end(digest)
            for layer, kept in zip(group.layers, block, strict=True):
                layer[row, end - BLOCK : end] = kept
            sequence.num_cached = end

    def keep(self, sequence: Sequence) -> None:
        """Hold what its slot has, in whole blocks."""
        group, row = sequence.group, sequence.row
        assert group is not None
        for end, digest in _digests(sequence.tokens[: sequence.num_cached]):
            if digest in self._blocks:
                self._blocks.move_to_end(digest)
                continue
            if not self._make_room():
                return
            self._blocks[digest] = [layer[row, end - BLOCK : end].clone() for layer in group.layers]
            self._slots.reserved = self.num_bytes

    def give_back(self, num_bytes: int) -> bool:
        """Let go of at least so many bytes; whether anything was there to let go of."""
        before = len(self._blocks)
        for _ in range(min(before, -(-num_bytes // self.bytes_per_block))):
            self._blocks.popitem(last=False)
        self._slots.reserved = self.num_bytes
        return len(self._blocks) < before

    def clear(self) -> None:
        """Let go of everything."""
        self._blocks.clear()
        self._slots.reserved = 0

    def _make_room(self) -> bool:
        """Room for one more block, without taking any from slots."""
        limit = min(self._max_bytes, self._slots.budget - self._slots.num_bytes)
        while self._blocks and self.num_bytes + self.bytes_per_block > limit:
            self._blocks.popitem(last=False)
        return self.num_bytes + self.bytes_per_block <= limit


def _digests(tokens: list[int]) -> Iterator[tuple[int, bytes]]:
    """The end and the digest of each whole block."""
    digest = b""
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        block = array("q", tokens[end - BLOCK : end]).tobytes()
        digest = hashlib.blake2b(digest + block, digest_size=16).digest()
        yield end, digest
