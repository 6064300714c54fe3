"""One step: which tokens go through the model, where their keys and values go, and what each of them may see."""

from __future__ import annotations

import functools
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch

from jupyter_llmcloud.inference.engines.slots.kv_slots import SlotGroup
from jupyter_llmcloud.inference.engines.slots.sequence import Sequence

_ROUND = 16
_STAIR = 1024
_MOST_PADDING = 1.25  # positions that parts are read with, beside those that they have


@dataclass(slots=True)
class Part:
    """Tokens of one sequence that are read in this step: the next ones, and guesses that follow them.

    Attributes:
        sequence: whose they are.
        tokens: their ids.
        num_scored: of so many of them, from the last one back, scores are wanted.
        start: where they begin among the tokens of the step.
        before: tokens of the sequence that come before them.
    """

    sequence: Sequence
    tokens: Items[int]
    num_scored: int = 0
    start: int = 0
    before: int = -1

    def __post_init__(self) -> None:
        self.before = self.sequence.num_cached


@dataclass(slots=True)
class Bundle:
    """Parts of rows that stand side by side, of which as many tokens were read before: attention takes them at once.

    Attributes:
        parts: in the order of their rows.
        longest: tokens of the longest of them, to which the others are padded.
        padded: of each row so padded, the tokens of the step: [parts * longest]; None: they are all as long.
        kept: which of these are no padding.
    """

    parts: list[Part]
    longest: int
    padded: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    @classmethod
    def of(cls, parts: list[Part], device: torch.device) -> Bundle:
        """Of these parts."""
        lengths = [len(part.tokens) for part in parts]
        longest = max(lengths)
        if min(lengths) == longest:
            return cls(parts, longest)
        padded = [part.start + min(n, len(part.tokens) - 1) for part in parts for n in range(longest)]
        kept = [index * longest + n for index, length in enumerate(lengths) for n in range(length)]
        both = torch.tensor(padded, device=device), torch.tensor(kept, device=device)
        return cls(parts, longest, *both)

    @property
    def row(self) -> int:
        """The first one."""
        return self.parts[0].sequence.row

    @property
    def tokens(self) -> slice:
        """Where they are among the tokens of the step."""
        return slice(self.parts[0].start, self.parts[-1].start + len(self.parts[-1].tokens))

    @property
    def length(self) -> int:
        """Positions that the last token of the longest sees."""
        return self.parts[0].before + self.longest


def _bundled(parts: list[Part], device: torch.device) -> list[Bundle]:
    bundles: list[list[Part]] = []
    for part in parts:
        if not (bundles and _goes_with(bundles[-1], part)):
            bundles.append([])
        bundles[-1].append(part)
    return [Bundle.of(bundle, device) for bundle in bundles]


def _goes_with(bundle: list[Part], part: Part) -> bool:
    last = bundle[-1]
    if part.before != last.before or part.sequence.row != last.sequence.row + 1:
        return False
    lengths = [len(one.tokens) for one in (*bundle, part)]
    return len(lengths) * max(lengths) <= _MOST_PADDING * sum(lengths)


@dataclass(slots=True)
class GroupStep:
    """The tokens of one group of slots, side by side: first one for each row that is decoded, then longer parts.

    Attributes:
        group: the slots.
        start, end: where they are among the tokens of the step.
        num_decoding: rows of which one token each is read.
        longest: positions that the decoded rows see, at most.
        mask: what the decoded rows see, by window (0: all): [rows, 1, 1, longest], 0 or minus infinity.
        longer: parts of more than one token.
        places: of each token, where its keys and values go among those of a layer, as [rows * capacity, ...].
    """

    group: SlotGroup
    start: int
    end: int
    num_decoding: int
    positions: torch.Tensor
    places: torch.Tensor
    longer: list[Part]
    longest: int
    _bundles: list[Bundle] | None = None
    _masks: dict[int, torch.Tensor] = field(default_factory=dict)
    _bundle_masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def bundles(self) -> list[Bundle]:
        """The longer parts, as attention takes them."""
        if self._bundles is None:
            self._bundles = _bundled(self.longer, self.positions.device)
        return self._bundles

    def mask(self, window: int, dtype: torch.dtype) -> torch.Tensor:
        """What each decoded row sees: everything up to its own position, or the window's end of it."""
        if (found := self._masks.get(window)) is None:
            own = self.positions[: self.num_decoding].unsqueeze(1)
            found = _mask(own, self.longest, window, dtype).view(self.num_decoding, 1, 1, self.longest)
            self._masks[window] = found
        return found

    def bundle_mask(self, bundle: Bundle, window: int, num_shared: int, dtype: torch.dtype) -> torch.Tensor:
        """What each token of such parts sees, as often as heads share a key: [tokens, positions]."""
        key = (bundle.row, window)
        if (found := self._bundle_masks.get(key)) is None:
            before = bundle.parts[0].before
            own = torch.arange(before, bundle.length, device=self.positions.device).unsqueeze(1)
            found = _mask(own, bundle.length, window, dtype).repeat(num_shared, 1)
            self._bundle_masks[key] = found
        return found


def _mask(own: torch.Tensor, length: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """Of tokens at the positions `own` [n, 1], what each sees of the first positions: [n, length]."""
    size = max(_STAIR, 1 << length.bit_length())
    stair = _stair(size, window, dtype, own.device)
    return stair.unfold(0, length, 1).index_select(0, (size - 1) - own.view(-1))


@functools.lru_cache(maxsize=16)
def _stair(size: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What the last of `size` positions sees, and `size` more that come after it, which it does not.

    What an earlier position sees is the same, some places further on: a mask is made without computing one.
    """
    stair = torch.full((2 * size,), -torch.inf, dtype=dtype, device=device)
    stair[max(0, size - window) if window else 0 : size] = 0
    return stair


@dataclass(slots=True)
class Step:
    """Everything that goes through the model at once.

    Attributes:
        ids, positions: of all tokens: [1, tokens].
        groups: the tokens by group of slots, one after the other.
        scored: which tokens' scores are wanted.
        parts: the parts of which scores are wanted, in the order of `scored`.
        num_positions: one more than the largest position.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    groups: list[GroupStep]
    scored: list[int]
    parts: list[Part]
    num_positions: int

    @property
    def only_decodes(self) -> bool:
        """Whether it is one token of each of the first rows of one group, with the scores of all."""
        here = self.groups[0]
        return len(self.groups) == 1 and not here.longer and len(self.scored) == here.num_decoding


def make_step(parts: Items[Part], device: torch.device) -> Step:
    """Put the parts side by side. A sequence has one part; rows that are decoded must be there without a gap."""
    ids: list[int] = []
    positions: list[int] = []
    groups: list[GroupStep] = []
    scored: list[int] = []
    ordered: list[Part] = []
    by_group: dict[int, list[Part]] = {}
    for part in parts:
        by_group.setdefault(id(part.sequence.group), []).append(part)
    for members in by_group.values():
        members.sort(key=lambda part: (len(part.tokens) > 1, part.sequence.row))
        group, start = members[0].sequence.group, len(ids)
        places: list[int] = []
        assert group is not None
        for part in members:
            part.start = len(ids)
            ids += part.tokens
            end, first = part.before + len(part.tokens), part.sequence.row * group.capacity
            positions += range(part.before, end)
            places += range(first + part.before, first + end)
            if part.num_scored:
                scored += range(len(ids) - part.num_scored, len(ids))
                ordered.append(part)
        single = [part for part in members if len(part.tokens) == 1]
        # Attention reads the rows from the first one on; one that stands apart is a longer part of one token.
        dense = len(single) if all(part.sequence.row == place for place, part in enumerate(single)) else 0
        longest = max((part.before + 1 for part in single[:dense]), default=0)
        numbers = torch.tensor([ids[start:], positions[start:], places], device=device)
        groups.append(
            GroupStep(
                group, start, len(ids), dense, numbers[1], numbers[2], members[dense:],
                min(group.capacity, -(-longest // _ROUND) * _ROUND),
            )
        )  # fmt: skip
    both = numbers[:2].unsqueeze(1) if len(groups) == 1 else torch.tensor([[ids], [positions]], device=device)
    return Step(both[0], both[1], groups, scored, ordered, max(positions) + 1)
