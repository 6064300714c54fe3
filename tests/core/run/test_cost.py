"""What a run has cost, and will, where a price is given."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.metrics.eta import TimeLeft
from jupyter_llmcloud.core.run.end_report import cost_so_far, describe_cost, read_price


def test_the_hours_of_all_ranks_are_counted() -> None:
    assert describe_cost(1.5, 7200) == "2.00 rank-hours at 1.50 an hour: about 3.00."
    assert describe_cost(0.0, 7200) == ""


def test_while_it_runs_the_time_that_is_left_is_added_for_each_rank() -> None:
    left = TimeLeft(1800, 3600, 5400)
    assert cost_so_far(2.0, 7200, 4, left) == "cost 4.00 so far, about 12.00 in the end (8.00 to 16.00)"
    assert cost_so_far(2.0, 7200, 4, None) == "cost 4.00 so far"
    assert cost_so_far(0.5, 36, 1, None) == "cost 0.005 so far"
    assert cost_so_far(0.0, 7200, 4, left) == ""


@pytest.mark.parametrize("price", ["cheap", "-1", "nan", "inf"])
def test_what_is_no_price_is_said(price: str) -> None:
    each, why = read_price(price)
    assert each == 0 and f"LLMCLOUD_PRICE_PER_HOUR='{price}' is not the price of an hour" in why


def test_a_price_is_read_and_none_is_nothing() -> None:
    assert read_price(" 1.25 ") == (1.25, "") and read_price("") == (0.0, "")
