"""The event that all rules know: none of them has a clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """Time has passed: `wake_at` of who is told has come."""
