"""What a run has cost, where a price is given."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.run.end_report import describe_cost


def test_the_hours_of_all_ranks_are_counted() -> None:
    assert describe_cost("1.5", 7200) == "2.00 rank-hours at 1.50 an hour: about 3.00."
    assert describe_cost("", 7200) == ""


@pytest.mark.parametrize("price", ["cheap", "-1", "nan", "inf"])
def test_what_is_no_price_is_said(price: str) -> None:
    assert f"LLMCLOUD_PRICE_PER_HOUR='{price}' is not the price of an hour" in describe_cost(price, 7200)
