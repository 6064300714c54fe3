"""What fits into a cell: by values."""

from __future__ import annotations

from jupyter_llmcloud.core.output.budget import MAX_RICH_CHARS, CellBudget


def test_a_display_that_does_not_fit_is_counted_and_an_update_takes_nothing() -> None:
    budget = CellBudget(1_000)
    assert budget.take_rich((0,), MAX_RICH_CHARS - 10, update=False)
    assert budget.take_rich((0,), 10, update=True) and budget.take_rich((0,), 10, update=False)
    assert not budget.take_rich((1,), 1, update=False)
    assert budget.num_dropped_rich == 1


def test_a_cell_is_full_until_half_of_it_was_taken_back() -> None:
    budget = CellBudget(1_000)
    budget.is_full = True
    budget.take_text((0,), 400)
    budget.take_text((1,), 600)
    budget.clear({0})
    assert budget.is_full
    budget.clear({1})
    assert not budget.is_full
