"""How fast this machine is, for promises about processor time that are stated for another one."""

from __future__ import annotations

import time

STATED_S = 0.062  # the median on the two cores for which the promises are stated


def slowness() -> float:
    """How many times as long as there a piece of Python works here, at least 1. Costs about 0.3 s."""
    return max(1.0, sorted(_piece() for _ in range(5))[2] / STATED_S)


def _piece() -> float:
    began, found = time.thread_time(), dict[int, int]()
    for number in range(400_000):
        found[number % 1000] = number * 2
    return time.thread_time() - began
