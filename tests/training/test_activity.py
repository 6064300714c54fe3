"""Whether a rank works while its main thread stands still."""

from __future__ import annotations

import time

from jupyter_llmcloud.training.diagnostics.activity import CLOSE_S, ProcessActivity, Stillness


def test_what_looks_the_same_has_stood_still_since_it_changed() -> None:
    still = Stillness(10.0)
    assert still.seconds("a", 11.0) == 0.0
    assert still.seconds("a", 14.0) == 3.0
    assert still.seconds("b", 15.0) == 0.0 and still.since == 15.0


def test_a_process_that_computes_is_busy_and_one_that_does_nothing_is_not() -> None:
    activity = ProcessActivity()
    assert not activity.has_begun
    activity.begin(0.0)
    assert activity.has_begun
    used = time.process_time()
    while time.process_time() - used < 0.1:
        sum(range(1_000))
    assert activity.is_busy(CLOSE_S + 1.0, with_children=False)
    assert activity.is_busy(CLOSE_S + 1.5, with_children=False), "it was looked at a moment ago"
    assert not activity.is_busy(1_000.0, with_children=False)
