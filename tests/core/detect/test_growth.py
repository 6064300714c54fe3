"""How soon a leak is told, and with which time: of ranks that share a host, that fill it soon, that leak late."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from jupyter_llmcloud.core.detect.growth import GrowthDetector, Level

GIB = 2**30
HOST = 100 * GIB


def told(
    used: Callable[[float], float], until_s: float, every_s: float = 2.0, num_ranks: int = 1
) -> tuple[float, float, str]:
    """(when the host of so many ranks that grow alike was full, when that was told, in which words); inf: never."""
    detector, told_at, text, now = GrowthDetector("memory-leak", "memory", "limit"), float("inf"), "", 0.0
    while now < until_s:
        own = used(now)
        if (left := HOST - num_ranks * own) <= 0:
            return now, told_at, text
        detector.feed(Level(now, own, own + left))
        if (alert := detector.check()) is not None:
            told_at, text = now, alert.text
        now += every_s
    return float("inf"), told_at, text


def minutes_said(text: str) -> float:
    found = re.search(r"in about (\d+) min", text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_ranks_that_leak_alike_fill_their_host_together(num_ranks: int) -> None:
    full_at, told_at, text = told(lambda now: (2 + 20 * now / 3600) * GIB, 6 * 3600, num_ranks=num_ranks)
    left_min = (full_at - told_at) / 60
    assert 3 < left_min <= 62, (full_at, told_at)
    assert minutes_said(text) == pytest.approx(left_min, rel=0.25, abs=1), text


@pytest.mark.parametrize("full_in_s", [150, 240, 400, 900])
def test_memory_that_is_full_within_minutes_is_told_before(full_in_s: float) -> None:
    full_at, told_at, text = told(lambda now: (10 + 90 * now / full_in_s) * GIB, 3600)
    assert told_at < full_at - 30, text
    assert minutes_said(text) * 60 == pytest.approx(full_at - told_at, abs=45)


@pytest.mark.parametrize("quiet_s", [900, 3600, 10 * 3600])
@pytest.mark.parametrize("full_in_s", [300, 1200, 3000])
def test_a_leak_that_begins_late_is_told_before_the_memory_is_full(quiet_s: float, full_in_s: float) -> None:
    def used(now: float) -> float:
        return (10 + 90 * max(0.0, now - quiet_s) / full_in_s) * GIB

    full_at, told_at, text = told(used, quiet_s + 2 * full_in_s)
    assert quiet_s < told_at < full_at - 30, text


@pytest.mark.parametrize("every_s", [2.0, 10.0])
def test_what_is_loaded_at_the_start_comes_back_or_is_small_is_no_leak(every_s: float) -> None:
    shapes: dict[str, Callable[[float], float]] = {
        "40 GiB are loaded within two minutes": lambda now: 2 + 40 * min(now, 120) / 120,
        "a buffer that is emptied": lambda now: 5 + 40 * (now % 300) / 300,
        "slow": lambda now: 5 + now / 3600,
        "flat": lambda _: 60,
    }
    for name, shape in shapes.items():
        assert told(lambda now, shape=shape: shape(now) * GIB, 4 * 3600, every_s)[1] == float("inf"), name
