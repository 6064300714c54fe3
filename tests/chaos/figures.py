"""What a driver measured, as one line."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence


def seconds(times: Sequence[float]) -> str:
    """`median 0.61 s, worst 2.30 s`."""
    return f"median {statistics.median(times):.2f} s, worst {max(times):.2f} s" if times else "no times"


def counts(counter: Counter[str]) -> str:
    """`stopped 97, finished 3`."""
    return ", ".join(f"{name} {number}" for name, number in counter.most_common())
