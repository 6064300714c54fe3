"""Population-based training by values: who goes on from whom, how values move, when a generation begins."""

from __future__ import annotations

import random

import pytest

from jupyter_llmcloud.core.search.population import (
    ChoiceRange,
    NumberRange,
    Origin,
    Population,
    Turn,
    check_population,
    moved,
    origin,
    read_population,
)
from jupyter_llmcloud.core.search.rules import (
    CloseGang,
    GangReady,
    OpenGang,
    StartTrial,
    SweepOver,
    SweepRules,
    SweepStopAsked,
    TrialEnded,
)
from jupyter_llmcloud.errors import UsageError

FOUR = Population(size=4, share=25)
DRAW = random.Random(0)


def turns(*values: float | None) -> list[Turn]:
    return [Turn(number, value) for number, value in enumerate(values)]


def origins(known: list[Turn], population: Population = FOUR, maximize: bool = False) -> list[Origin | None]:
    """Of each member of the generation after those that are known."""
    first = len(known)
    return [origin(first + member, known, population, maximize, DRAW) for member in range(population.size)]


def test_the_first_generation_begins_anew() -> None:
    assert [origin(number, [], FOUR, False, DRAW) for number in range(4)] == [None] * 4


def test_the_worst_member_takes_over_the_best_and_moves_its_values_the_others_go_on() -> None:
    stays = [Origin(0, False), Origin(1, False), Origin(2, False)]
    assert origins(turns(0.3, 0.1, 0.2, 0.9)) == [*stays, Origin(1, True)]
    assert origins(turns(0.3, 0.1, 0.2, 0.9), maximize=True) == [
        Origin(0, False), Origin(3, True), Origin(2, False), Origin(3, False),
    ]  # fmt: skip


def test_each_of_the_worst_takes_over_one_of_the_best() -> None:
    eight = Population(size=8, share=25)
    found = [one for _ in range(20) for one in origins(turns(1, 2, 3, 4, 5, 6, 7, 8), eight) if one is not None]
    assert {one.parent for one in found if one.moves} == {0, 1}
    assert [one.parent for one in found[:6]] == [0, 1, 2, 3, 4, 5] and all(one.moves for one in found[6:8])


def test_a_member_that_failed_takes_over_another_one_and_is_the_worst() -> None:
    assert origins(turns(0.3, None, 0.2, 0.9)) == [
        Origin(0, False), Origin(2, True), Origin(2, False), Origin(3, False),
    ]  # fmt: skip
    assert origins(turns(None, None, None, 0.9)) == [Origin(3, True)] * 3 + [Origin(3, False)]


def test_a_generation_that_failed_as_a_whole_is_left_out() -> None:
    known = turns(0.3, 0.1, 0.2, 0.9, None, None, None, None)
    found = origins(known)
    assert [one.parent for one in found if one is not None] == [0, 1, 2, 1]
    assert origins(turns(None, None, None, None)) == [None] * 4


def test_only_the_newest_generation_counts() -> None:
    assert origins(turns(0.0, 9, 9, 9, 4, 3, 2, 1)) == [
        Origin(7, True), Origin(5, False), Origin(6, False), Origin(7, False),
    ]  # fmt: skip


def test_values_move_by_little_within_their_range_or_are_drawn_anew() -> None:
    ranges: dict[str, NumberRange | ChoiceRange] = {
        "lr": NumberRange(1e-4, 1e-1, is_log=True),
        "dropout": NumberRange(0.0, 0.5),
        "width": NumberRange(8, 64, is_log=True, is_whole=True),
        "depth": NumberRange(1, 4, step=1, is_whole=True),
        "grid": NumberRange(0.0, 1.0, step=0.3),
        "kind": ChoiceRange(("a", None, 3)),
    }
    values = {"lr": 1e-2, "dropout": 0.0, "width": 8, "depth": 4, "grid": 0.3, "kind": None}
    draw = random.Random(1)
    near = [moved(values, ranges, 0, draw) for _ in range(40)]
    assert {round(one["lr"], 6) for one in near} == {0.008, 0.0125}
    assert {one["dropout"] for one in near} == {0.0, 0.05} and {one["depth"] for one in near} == {3, 4}
    assert {one["width"] for one in near} == {8, 10} and {round(one["grid"], 3) for one in near} == {0.0, 0.6}
    assert all(one["kind"] is None and isinstance(one["depth"], int) for one in near)
    new = [moved(values, ranges, 100, draw) for _ in range(300)]
    assert min(one["lr"] for one in new) < 3e-4 and max(one["lr"] for one in new) > 3e-2
    assert {one["kind"] for one in new} == {"a", None, 3} and {one["depth"] for one in new} == {1, 2, 3, 4}
    assert {round(one["grid"], 3) for one in new} == {0.0, 0.3, 0.6, 0.9}
    assert all(8 <= one["width"] <= 64 and 0 <= one["dropout"] <= 0.5 for one in new)


@pytest.mark.parametrize(
    ("prune", "sampler", "trials", "words"),
    [
        ("pbt,population=8", "tpe", 10, "less than two generations of 8.*--trials 16 or more"),
        ("pbt,share=60", "tpe", 20, "share is at most 50"),
        ("pbt", "grid", 20, "--sampler grid does not go with --prune pbt"),
    ],
)
def test_options_that_do_not_go_together_are_refused(prune: str, sampler: str, trials: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_population(prune, sampler, trials)


def test_settings_are_read_and_other_pruners_have_no_population() -> None:
    assert read_population("pbt,population=8,resample=10") == Population(8, 25, 10)
    assert read_population("asha") is None
    check_population("none", "grid", 1)


# --- its place in the rules of a sweep ---


def test_a_generation_begins_when_the_one_before_has_ended() -> None:
    rules = SweepRules(num_trials=4, parallel=2, generation=2)
    assert rules.begin() == [OpenGang(0), OpenGang(1)]
    assert rules.handle(GangReady(0)) + rules.handle(GangReady(1)) == [StartTrial(0, 0, 0), StartTrial(1, 1, 0)]
    assert rules.handle(TrialEnded(1, "done")) == []
    assert rules.handle(TrialEnded(0, "done")) == [StartTrial(0, 2, 0), StartTrial(1, 3, 0)]
    assert rules.handle(TrialEnded(3, "done")) == [CloseGang(1)]
    assert rules.handle(TrialEnded(2, "done")) == [CloseGang(0), SweepOver("finished", "")]


def test_a_gang_that_waits_for_a_generation_runs_what_another_one_has_lost() -> None:
    rules = SweepRules(num_trials=4, parallel=2, generation=2)
    rules.begin()
    for gang in range(2):
        rules.handle(GangReady(gang))
    rules.handle(TrialEnded(1, "done"))
    told = rules.handle(TrialEnded(0, "lost", "killed"))
    assert told == [CloseGang(0), StartTrial(1, 0, 1), OpenGang(2)]
    assert rules.handle(GangReady(2)) == []
    assert rules.handle(TrialEnded(0, "done")) == [StartTrial(1, 2, 0), StartTrial(2, 3, 0)]


def test_a_stop_closes_the_gangs_that_wait() -> None:
    rules = SweepRules(num_trials=4, parallel=2, generation=2)
    rules.begin()
    for gang in range(2):
        rules.handle(GangReady(gang))
    rules.handle(TrialEnded(1, "done"))
    told = rules.handle(SweepStopAsked())
    assert CloseGang(1) in told
    assert rules.handle(TrialEnded(0, "stopped"))[-1] == SweepOver("stopped", "")


def test_what_was_under_way_comes_before_the_rest_of_its_generation() -> None:
    rules = SweepRules(
        num_trials=6, parallel=1, num_ended=2, num_measured=2, first_number=3, unfinished=[2], generation=3
    )
    rules.begin()
    assert rules.handle(GangReady(0)) == [StartTrial(0, 2, 0)]
    assert rules.handle(TrialEnded(2, "done")) == [StartTrial(0, 3, 0)]
