"""How many collectives a rank has finished: what torch's recorder tells of it, without a group."""

from __future__ import annotations

from jupyter_llmcloud.training.diagnostics.flight_recorder import FinishedCounts

WORLD, OTHER = ("gloo", "0"), ("gloo", "1")


class Asked:
    """Answers whether collectives are finished, and remembers which it was asked for."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.of: list[tuple[int, int]] = []

    def __call__(self, first: int, last: int) -> bool:
        self.of.append((first, last))
        return self.answer


def test_a_count_that_falls_is_not_believed() -> None:
    counts, asked = FinishedCounts(), Asked(False)
    assert [counts.count(WORLD, 7, told, asked) for told in (6, 7, 6, 6)] == [6, 7, 7, 7]
    assert asked.of == []


def test_one_that_stays_behind_is_checked() -> None:
    counts, asked = FinishedCounts(), Asked(True)
    assert [counts.count(WORLD, 7, 5, asked) for _ in range(3)] == [5, 5, 5]
    assert asked.of == [], "a collective in flight costs no check"
    assert counts.count(WORLD, 7, 5, asked) == 7
    assert asked.of == [(6, 7)]
    assert counts.count(WORLD, 7, 5, asked) == 7
    assert asked.of == [(6, 7)], "what was found out is kept"
    assert counts.count(WORLD, 8, 5, asked) == 7


def test_one_that_is_really_in_flight_stays_so_until_it_is_finished() -> None:
    counts, asked = FinishedCounts(), Asked(False)
    assert {counts.count(WORLD, 7, 6, asked) for _ in range(100)} == {6}
    assert len(asked.of) == 5, "less and less often"
    asked.answer = True
    assert [counts.count(WORLD, 7, 6, asked) for _ in range(28)][-1] == 7


def test_groups_are_counted_apart() -> None:
    counts, asked = FinishedCounts(), Asked(True)
    assert (counts.count(WORLD, 7, 7, asked), counts.count(OTHER, 2, 1, asked)) == (7, 1)
