"""Replicas of a model that have come apart without a word, found by the digests that ranks send with a checkpoint.

Equal must be: parameters, on all ranks that hold the same part. A buffer that follows each rank's own data (the running
statistics of batch norm) may differ, so a buffer counts only where it stands still on some rank. Random numbers
may differ too (augmentation draws as many as it needs): they are said beside a split, and are none by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReplicaDigests:
    """What one rank holds at a checkpoint: fingerprints by name.

    Attributes:
        parameters, buffers: of replicated models, in the order of the model. Ranks that hold different parts of one
            model have different names for them.
        rng: of its random number generators.
    """

    parameters: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, str] = field(default_factory=dict)
    rng: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplicaSplit:
    """The first tensor in which replicas differ.

    Attributes:
        kind: "parameter" or "buffer".
        name: of the tensor.
        ranks: that differ from the most ranks (of two halves: from that with the lowest rank), in order.
        others: that hold it like each other, in order.
        num_tensors: how many tensors differ.
        rng: which random number generators differ between those ranks.
    """

    kind: str
    name: str
    ranks: tuple[int, ...]
    others: tuple[int, ...]
    num_tensors: int
    rng: tuple[str, ...] = ()


class DivergenceCheck:
    """Looks at the checkpoints of one attempt, one after the other."""

    def __init__(self) -> None:
        self._before: dict[int, ReplicaDigests] = {}
        self._is_said = False
        self._last_alike: int | None = None

    def look(self, step: int, digests: Mapping[int, ReplicaDigests]) -> str:
        """What to say of a checkpoint, by rank; "" when its replicas are alike, or the split was said before."""
        split = find_split(digests, self._before)
        self._before = dict(digests)
        if split is None:
            self._last_alike = step if any(held.parameters for held in digests.values()) else self._last_alike
            return ""
        if self._is_said:
            return ""
        self._is_said = True
        return _in_words(split, step, self._last_alike)


def find_split(digests: Mapping[int, ReplicaDigests], before: Mapping[int, ReplicaDigests]) -> ReplicaSplit | None:
    """Compare what ranks hold now; `before`: what they held at the last checkpoint. None when replicas are alike."""
    by_rank = {rank: held.parameters for rank, held in digests.items()}
    apart = {name: held for name, held in _by_name(by_rank).items() if len(set(held.values())) > 1}
    kind = "parameter"
    if not apart:
        kind = "buffer"
        by_rank = {rank: held.buffers for rank, held in digests.items()}
        apart = {
            name: held
            for name, held in _by_name(by_rank).items()
            if len(set(held.values())) > 1 and _stands_still(name, held, before)
        }
    if not apart:
        return None
    name, held = next(iter(apart.items()))
    counts = Counter(held[rank] for rank in sorted(held))  # of equal counts the first seen comes first
    usual = counts.most_common(1)[0][0]
    ranks = tuple(rank for rank in sorted(held) if held[rank] != usual)
    others = tuple(rank for rank in sorted(held) if held[rank] == usual)
    rng = _by_name({rank: digests[rank].rng for rank in held})
    unlike = tuple(generator for generator, states in rng.items() if len(set(states.values())) > 1)
    return ReplicaSplit(kind, name, ranks, others, len(apart), unlike)


def _by_name(by_rank: Mapping[int, Mapping[str, str]]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for rank in sorted(by_rank):
        for name, digest in by_rank[rank].items():
            found.setdefault(name, {})[rank] = digest
    return found


def _stands_still(name: str, held: Mapping[int, str], before: Mapping[int, ReplicaDigests]) -> bool:
    return any(rank in before and before[rank].buffers.get(name) == digest for rank, digest in held.items())


def _in_words(split: ReplicaSplit, step: int, last_alike: int | None) -> str:
    since = f"They were alike at step {last_alike}" if last_alike is not None else "It is the first checkpoint"
    more = f" and {split.num_tensors - 1} more" if split.num_tensors > 1 else ""
    drawn = f" Their random numbers differ too ({', '.join(split.rng)})." if split.rng else ""
    return (
        f"the replicas of the model differ at step {step}: {split.kind} {split.name}{more} is another one on "
        f"{_ranks(split.ranks)} than on {_ranks(split.others)}. {since}.{drawn} Training goes on, and --save takes "
        "the first rank's. Look for a step or a write that only some ranks do. Replicas on processors of "
        "different kinds may differ in the last digits."
    )


def _ranks(ranks: tuple[int, ...]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
