"""Waiting is told from communication by what the rank spends that is blocked least."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.run.time_split import PARTS, TimeSplits, in_words, shares_of


def splits(*ranks: int) -> TimeSplits:
    found = TimeSplits()
    found.begin(ranks)
    return found


def test_what_is_blocked_beyond_the_least_blocked_rank_is_waiting() -> None:
    times = splits(0, 1)
    times.heard(0, 1.0, [1.0, 9.0, 0.0, 0.0], [(1, 1, 9.0)])
    times.heard(1, 1.0, [8.0, 1.0, 1.0, 0.0], [(1, 1, 1.0)])
    assert times.seconds() == {
        0: {"compute": 1.0, "communication": 1.0, "data": 0.0, "waiting": 8.0, "checkpoint": 0.0},
        1: {"compute": 8.0, "communication": 1.0, "data": 1.0, "waiting": 0.0, "checkpoint": 0.0},
    }


def test_ranks_that_are_late_in_turns_wait_for_each_other_in_turns() -> None:
    times = splits(0, 1)
    times.heard(0, 1.0, [10.0, 10.0, 0.0, 0.0], [(1, 1, 9.0), (2, 1, 10.0)])
    times.heard(1, 1.0, [10.0, 10.0, 0.0, 0.0], [(1, 1, 1.0), (2, 1, 10.0)])
    waited = {rank: parts["waiting"] for rank, parts in times.seconds().items()}
    assert waited == {0: 8.0, 1: 8.0}  # as sums over both steps they look alike


def test_points_that_only_one_rank_has_told_of_are_left_out() -> None:
    times = splits(0, 1)
    times.heard(0, 1.0, [0.0, 6.0, 0.0, 0.0], [(1, 1, 1.0), (1, 2, 2.0), (1, 3, 3.0), (2, 1, 6.0)])
    times.heard(1, 1.0, [0.0, 4.0, 0.0, 0.0], [(1, 1, 1.0), (2, 1, 4.0)])
    assert times.seconds()[0]["waiting"] == 2.0
    assert times.seconds()[1]["communication"] == 4.0


def test_a_rank_that_is_blocked_now_waits_for_one_that_is_not() -> None:
    times = splits(0, 1)
    times.heard(0, 5.0, [1.0, 4.0, 0.0, 0.0])
    times.heard(1, 5.0, [5.0, 0.0, 0.0, 0.0])
    assert times.seconds()[0]["waiting"] == 4.0


def test_the_window_forgets_what_is_longer_ago_than_ten_seconds() -> None:
    times = splits(0)
    for second in range(1, 41):
        in_data = float(min(second, 20))
        times.heard(0, float(second), [second - in_data, 0.0, in_data, 0.0])
    assert times.shares()[0]["compute"] == pytest.approx(1.0)
    assert shares_of(times.seconds()[0])["data"] == pytest.approx(0.5)


def test_a_rank_that_is_silent_is_not_told_to_do_what_it_did_last() -> None:
    times = splits(0, 1)
    times.heard(1, 1.0, [1.0, 0.0, 0.0, 0.0])
    for second in range(1, 14):  # waits for rank 1, whose process is stopped
        times.heard(0, float(second), [1.0, second - 1.0, 0.0, 0.0])
        assert times.shares().keys() >= ({1} if 1 < second <= 11 else set())
    assert times.shares().keys() == {0}
    times.heard(1, 14.0, [14.0, 0.0, 0.0, 0.0])
    assert times.shares().keys() == {0, 1}


def test_seconds_add_up_over_attempts_and_leaders() -> None:
    times = TimeSplits({0: {"compute": 5.0, "data": 1.0}})
    times.begin([0, 1])
    times.heard(0, 1.0, [2.0, 0.0, 0.0, 3.0])
    times.begin([0, 1])
    times.heard(0, 1.0, [1.0, 0.0, 0.0, 0.0])
    assert times.seconds()[0] == dict(zip(PARTS, (8.0, 0.0, 1.0, 0.0, 3.0), strict=True))


def test_shares_add_up_to_one_and_a_young_rank_has_none() -> None:
    times = splits(0, 1)
    times.heard(0, 1.0, [1.0, 0.25, 0.25, 0.5])
    times.heard(1, 1.0, [0.1, 0.0, 0.0, 0.0])
    assert times.shares().keys() == {0}
    assert sum(times.shares()[0].values()) == pytest.approx(1.0)


def test_what_was_said_before_changes_nothing_afterwards() -> None:
    times = splits(0)
    times.heard(0, 2.0, [4.0, 0.0, 0.0, 0.0])
    times.heard(0, 3.0, [3.0, 0.0, 0.0, 0.0])
    assert times.seconds()[0]["compute"] == 4.0


def test_a_split_in_words_begins_with_the_most() -> None:
    assert in_words({"compute": 0.2, "data": 0.7, "waiting": 0.1, "checkpoint": 0.001}) == (
        "data 70 %, compute 20 %, waiting 10 %"
    )
