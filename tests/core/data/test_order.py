"""The order of an epoch: every row once, known at any place, another one in each epoch."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.core.data.order import RowOrder, WindowOrder, shuffled


def rows_of(order: RowOrder) -> list[int]:
    return [order[place] for place in range(len(order))]


@settings(max_examples=40)
@given(st.integers(1, 3000), st.integers(0, 1 << 40), st.integers(0, 100))
def test_a_shuffle_holds_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    assert sorted(rows_of(shuffled(num_rows, seed, epoch))) == list(range(num_rows))


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 1 << 40))
def test_windows_hold_every_row_once(groups: list[int], window: int, seed: int) -> None:
    assert sorted(rows_of(WindowOrder(groups, window, seed, 0))) == list(range(sum(groups)))


def test_a_window_reads_no_more_groups_than_it_says() -> None:
    order = rows_of(WindowOrder([10] * 12, 3, seed=1, epoch=0))
    for start in range(0, 120, 30):
        assert len({row // 10 for row in order[start : start + 30]}) == 3


def test_epochs_and_seeds_differ_and_the_same_ones_do_not() -> None:
    first = rows_of(shuffled(500, 0, 0))
    assert first == rows_of(shuffled(500, 0, 0))
    assert first != rows_of(shuffled(500, 0, 1)) != rows_of(shuffled(500, 1, 0))


def test_a_shuffle_looks_like_chance() -> None:
    """As many places keep the order of their neighbours as by chance, and the mean distance moved is a third."""
    order = rows_of(shuffled(10_000, 3, 0))
    rising = sum(a < b for a, b in pairwise(order))
    assert abs(rising - 5000) < 150
    assert abs(sum(abs(row - place) for place, row in enumerate(order)) / 10_000 - 3333) < 150


def test_a_place_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError):
        shuffled(10, 0, 0)[10]
