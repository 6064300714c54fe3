"""What a training step holds at its fullest, from the events of its allocations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

Event = tuple[int, int]  # which storage, bytes it takes (or gives back, below zero)


@dataclass(frozen=True)
class MeasuredStep:
    """Bytes of one process that trains alone, in a step with the state of its optimizer already there.

    Attributes:
        parameters: trained or not.
        gradients: of the parameters that are trained.
        optimizer: its state.
        activations: what forward and backward hold beside them, at most.
        update: what the optimizer's step holds beside them for a moment, at most.
        peak: of everything together.
        num_parameters: how many numbers the parameters have.
        flops: floating point operations of a step.
        batch: rows of a step on one rank; 0 when that is not known.
        largest_block: bytes of the largest part that a sharding plan gathers as a whole.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    update: int
    peak: int
    num_parameters: int = 0
    flops: int = 0
    batch: int = 0
    largest_block: int = 0


@dataclass(frozen=True)
class Roles:
    """Which storages hold what when a step has ended."""

    parameters: Collection[int]
    gradients: Collection[int]
    optimizer: Collection[int]


def peaks(events: Sequence[Event], roles: Roles, begin: int, update: int) -> tuple[int, int, int]:
    """The most bytes beside parameters, gradients and state in forward and backward, in the update, and of everything.

    Args:
        events: in order, from the start of the process.
        roles: of the storages at the end.
        begin: the number of events before the step.
        update: the number of events before the optimizer began.
    """
    known = {*roles.parameters, *roles.gradients, *roles.optimizer}
    all_bytes = beside = 0
    most_beside, most_in_update, peak = 0, 0, 0
    for number, (storage, change) in enumerate(events):
        all_bytes += change
        beside += 0 if storage in known else change
        if number >= update:
            most_in_update, peak = max(most_in_update, beside), max(peak, all_bytes)
        elif number >= begin:
            most_beside, peak = max(most_beside, beside), max(peak, all_bytes)
    return most_beside, most_in_update, peak


def held(events: Sequence[Event], storages: Collection[int]) -> int:
    """Bytes of some storages."""
    return sum(change for storage, change in events if storage in storages and change > 0)
