"""Which of the values that a trial logs are told to the study: a trial may log thousands, a pruner needs tens."""

from __future__ import annotations

DENSE = 32  # values of a trial that are told, each one; then every second, every fourth, ...


def is_reported(index: int) -> bool:
    """Whether the value of this index (from 0) is told; the same for every trial, so that they can be compared."""
    count, stride = index + 1, 1
    while count > DENSE * stride:
        stride *= 2
    return count % stride == 0
