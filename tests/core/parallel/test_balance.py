"""Rows go to ranks by their speed; what is noise, or worth little, moves nothing."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.parallel.balance import Balance, rows_of
from jupyter_llmcloud.core.parallel.plan import check_balance
from jupyter_llmcloud.errors import UsageError


@pytest.mark.parametrize(
    ("weights", "total", "rows"),
    [
        ((2, 1), 12, [8, 4]),
        ((1, 1, 1), 8, [3, 3, 2]),
        ((1000, 1), 8, [7, 1]),
        ((1, 1, 1), 2, [1, 1, 0]),
        ((0.5, 0.25, 0.25), 5, [3, 1, 1]),
    ],
)
def test_rows_are_whole_and_sum_up_and_every_rank_has_one(
    weights: tuple[float, ...], total: int, rows: list[int]
) -> None:
    assert rows_of(weights, total) == rows
    assert sum(rows) == total


def test_more_than_one_row_is_left_to_each_where_a_model_needs_them() -> None:
    assert rows_of((9, 1), 6, least=2) == [4, 2]
    assert rows_of((9, 1), 12, least=2) == [10, 2]
    assert rows_of((9, 1), 3, least=2) == [2, 1]  # as without
    assert Balance(2, [3.0, 1.0], 2).rows(4) == [2, 2]


def test_shares_are_equal_until_two_windows_in_a_row_call_for_others() -> None:
    balance = Balance(2)
    assert balance.rows(16) == [8, 8]
    assert not balance.observe([1.0, 2.0], [8, 8])
    assert balance.observe([1.0, 2.0], [8, 8])
    assert balance.rows(12) == [8, 4]


def test_one_slow_window_moves_nothing() -> None:
    balance = Balance(2)
    for seconds in ([1.0, 2.0], [1.0, 1.0], [2.0, 1.0], [1.0, 1.02]):
        assert not balance.observe(seconds, [8, 8])
    assert balance.rows(16) == [8, 8]


def test_what_gains_less_than_a_twentieth_moves_nothing() -> None:
    balance = Balance(2)
    assert not any(balance.observe([1.0, 1.05], [8, 8]) for _ in range(10))


def test_short_windows_are_put_together() -> None:
    balance = Balance(2)
    changes = [balance.observe([0.1, 0.2], [8, 8]) for _ in range(4)]
    assert changes == [False, False, False, True]


def test_shares_follow_a_rank_that_becomes_fast_again_and_then_stay() -> None:
    balance = Balance(2)
    costs = [0.1, 0.2]
    rows = balance.rows(30)

    def steps(number: int) -> int:
        nonlocal rows
        changes = 0
        for _ in range(number):
            changes += balance.observe([cost * num for cost, num in zip(costs, rows, strict=True)], rows)
            rows = balance.rows(30)
        return changes

    assert steps(10) == 1 and rows == [20, 10]
    costs = [0.1, 0.1]
    assert steps(10) == 1 and rows == [15, 15]


@pytest.mark.parametrize(
    ("plan", "ranks", "words"), [("fsdp", 2, "--plan ddp"), ("diloco:4", 2, "--plan ddp"), ("", 1, "--ranks names 1")]
)
def test_where_it_is_not_possible_it_is_refused(plan: str, ranks: int, words: str) -> None:
    check_balance(False, plan, ranks, 2)
    with pytest.raises(UsageError, match=words):
        check_balance(True, plan, ranks, 2)
