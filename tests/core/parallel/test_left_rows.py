"""What a lost worker has left of a pass: shared by the others, each row once."""

from __future__ import annotations

import random

import pytest

from jupyter_llmcloud.core.parallel.left_rows import PassEnds, PassRows, divide


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_divided_each_once_in_as_many_steps_for_all_and_in_no_larger_batches(seed: int) -> None:
    chance = random.Random(seed)
    size, takers = chance.randint(2, 6), chance.randint(1, 5)
    rows = list(range(chance.randint(takers, 60)))
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    parts = divide(batches, takers)
    assert sorted(row for part in parts for batch in part for row in batch) == rows
    assert all(1 <= len(batch) <= size for part in parts for batch in part)
    assert len({len(part) for part in parts}) == 1


def test_fewer_rows_than_takers_go_to_the_first_of_them() -> None:
    assert divide([[7, 8]], 3) == [[[7]], [[8]], []]
    assert divide([], 2) == [[], []]


def shares(worker: int) -> list[list[int]]:
    """Twelve rows of each of four workers, in six batches."""
    return [[worker * 12 + at, worker * 12 + at + 1] for at in range(0, 12, 2)]


def test_who_is_lost_while_it_takes_over_leaves_its_part_of_that_too() -> None:
    of = {worker: PassRows(shares) for worker in (0, 2, 3)}
    first = {worker: of[worker].take_over({1: (0, 4)}, [0, 2, 3], worker) for worker in of}
    assert sorted(row for part in first.values() for batch in part for row in batch) == [20, 21, 22, 23]
    # Worker 3 has sent five batches of its own share, and nothing of what it took over.
    second = {worker: of[worker].take_over({3: (0, 5)}, [0, 2], worker) for worker in (0, 2)}
    expected = sorted([46, 47, *(row for batch in first[3] for row in batch)])
    assert sorted(row for part in second.values() for batch in part for row in batch) == expected


def test_who_had_begun_what_it_took_over_leaves_the_rest_of_it() -> None:
    rows = PassRows(shares)
    taken = rows.take_over({1: (0, 0)}, [0, 2], 2)
    assert rows.take_over({2: (1, 2)}, [0], 0) == divide(taken[2:], 1)[0]


def test_all_wait_at_the_end_of_a_pass_and_share_what_is_left_once() -> None:
    ends = PassEnds()
    ends.note(2, 0, "0.0", (0, 3))
    ends.note(2, 1, "0.0", (0, 2))  # its other model was trained on less
    ends.arrive(0, "0.0", 0, 5)
    assert not ends.settle("0.0", 0, [0, 1, 2], []) and ends.is_waiting(0)
    ends.arrive(1, "0.0", 0, 7)
    assert ends.settle("0.0", 0, [0, 1], [2])
    assert ends.answer("0.0", 0) == {"takers": [0, 1], "left": {"2": [0, 2]}, "num_meetings": 7}
    assert not ends.is_waiting(0)
    for worker in (0, 1):
        ends.arrive(worker, "0.0", 1, 8)
    assert ends.settle("0.0", 1, [0, 1], [2]) and not ends.answer("0.0", 1)["left"]


def test_later_passes_have_all_of_a_lost_worker_to_share() -> None:
    ends = PassEnds()
    ends.note(1, 0, "0.0", (0, 3))
    ends.arrive(0, "0.1", 0, 0)
    assert ends.settle("0.1", 0, [0], [1]) and ends.answer("0.1", 0)["left"] == {"1": [0, 0]}


def test_workers_that_wait_at_the_ends_of_different_passes_do_not_wait_for_each_other() -> None:
    ends = PassEnds()
    ends.arrive(0, "0.0", 0, 0)
    assert not ends.settle("0.0", 0, [0, 1], [])
    ends.arrive(1, "1.0", 0, 0)
    assert ends.settle("0.0", 0, [0, 1], []) and not ends.is_waiting(0)
    assert not ends.settle("1.0", 0, [0, 1], [])  # it comes there, too
