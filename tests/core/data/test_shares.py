"""What each rank takes: every row once, in as many steps on every rank, also when the number of ranks changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupyter_llmcloud.core.data.shares import EpochShares
from jupyter_llmcloud.errors import UsageError


def taken(shares: EpochShares, steps: int | None = None) -> list[int]:
    num = shares.num_steps if steps is None else steps
    return [place for step in range(num) for rank in range(shares.world_size) for place in shares.places(step, rank)]


sizes = st.integers(1, 7)


@settings(max_examples=40)
@given(st.integers(7, 400), st.integers(0, 30), sizes)
def test_every_row_is_taken_once_in_order(num_rows: int, more: int, ranks: int) -> None:
    shares = EpochShares(num_rows, ranks + more, ranks)
    assert taken(shares) == list(range(num_rows))
    assert all(len(shares.places(step, rank)) for step in range(shares.num_steps) for rank in range(ranks))


@settings(max_examples=40)
@given(st.integers(50, 400), st.integers(7, 20), sizes, sizes, st.integers(0, 3))
def test_another_world_goes_on_at_the_row_where_the_first_one_was(
    num_rows: int, batch: int, before: int, after: int, steps: int
) -> None:
    first = EpochShares(num_rows, batch, before)
    done = min(steps, first.num_steps)
    rest = EpochShares(num_rows, batch + 3, after, start=first.rows_after(done))
    rows = taken(first, done) + taken(rest)
    assert sorted({*rows}) == list(range(num_rows))
    assert len(rows) - num_rows < after, "a row is repeated only where fewer are left than there are ranks"


def test_rows_at_the_end_go_with_the_step_before_when_they_are_fewer_than_the_ranks() -> None:
    shares = EpochShares(17, 8, 4)
    assert [len(shares.places(1, rank)) for rank in range(4)] == [2, 2, 2, 3]
    assert shares.num_steps == 2


def test_padding_repeats_rows_of_the_beginning_and_dropping_leaves_the_rest_out() -> None:
    assert taken(EpochShares(10, 4, 2, last="pad")) == [*range(10), 0, 1]
    assert taken(EpochShares(10, 4, 2, last="drop")) == [*range(8)]


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (lambda: EpochShares(3, 8, 4), "there are 3 rows for 4 ranks"),
        (lambda: EpochShares(100, 3, 4), "global_batch_size=4 or more"),
        (lambda: EpochShares(100, 4, 4, last="some"), "Choose one of share, pad, drop"),
    ],
)
def test_what_cannot_be_shared_is_said(shares: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        shares()  # type: ignore[operator]
