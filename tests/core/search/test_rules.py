"""The rules of a sweep: which trial runs where, what becomes of lost ones, when it ends and with which word."""

from __future__ import annotations

import random

import pytest

from jupyter_llmcloud.core.search.choices import read_pruner
from jupyter_llmcloud.core.search.reported_steps import is_reported
from jupyter_llmcloud.core.search.rules import (
    MAX_LOST_GANGS,
    CloseGang,
    Event,
    Exhausted,
    GangReady,
    GangRefused,
    Instruction,
    OpenGang,
    StartTrial,
    StopTrial,
    SweepOver,
    SweepRules,
    SweepStopAsked,
    TimeOver,
    TrialEnded,
)
from jupyter_llmcloud.errors import UsageError


def handled(rules: SweepRules, *events: Event) -> list[Instruction]:
    """What the last of these events leads to."""
    told: list[Instruction] = []
    for event in events:
        told = rules.handle(event)
    return told


def test_a_gang_runs_one_trial_after_the_other_and_is_closed_in_the_end() -> None:
    rules = SweepRules(num_trials=2, parallel=1)
    assert rules.begin() == [OpenGang(0)]
    assert rules.handle(GangReady(0)) == [StartTrial(0, 0, 0)]
    assert rules.handle(TrialEnded(0, "done")) == [StartTrial(0, 1, 0)]
    assert rules.handle(TrialEnded(1, "pruned")) == [CloseGang(0), SweepOver("finished", "")]


def test_there_are_no_more_gangs_than_trials() -> None:
    assert SweepRules(num_trials=2, parallel=8).begin() == [OpenGang(0), OpenGang(1)]


def test_a_gang_without_work_is_given_back_while_others_go_on() -> None:
    rules = SweepRules(num_trials=2, parallel=2)
    rules.begin()
    handled(rules, GangReady(0), GangReady(1))
    assert rules.handle(TrialEnded(0, "done")) == [CloseGang(0)]
    assert rules.handle(TrialEnded(1, "done")) == [CloseGang(1), SweepOver("finished", "")]


def test_a_trial_whose_ranks_are_lost_is_run_once_more_with_its_number() -> None:
    rules = SweepRules(num_trials=1, parallel=1)
    rules.begin()
    assert handled(rules, GangReady(0), TrialEnded(0, "lost", "killed")) == [CloseGang(0), OpenGang(1)]
    assert rules.handle(GangReady(1)) == [StartTrial(1, 0, 1)]
    told = rules.handle(TrialEnded(0, "lost", "killed"))
    assert told == [CloseGang(1), SweepOver("failed", "the trial has failed. The first error: killed")]


def test_a_lost_gang_costs_no_other_trial() -> None:
    rules = SweepRules(num_trials=4, parallel=2)
    rules.begin()
    handled(rules, GangReady(0), GangReady(1), TrialEnded(0, "lost"))
    assert rules.handle(TrialEnded(1, "done")) == [StartTrial(1, 0, 1)]  # the lost one, at once
    assert rules.handle(GangReady(2)) == [StartTrial(2, 2, 0)]


def test_ranks_that_are_lost_again_and_again_end_it() -> None:
    rules = SweepRules(num_trials=40, parallel=1)
    rules.begin()
    told = rules.handle(GangReady(0))
    for gang in range(1, MAX_LOST_GANGS + 1):
        started = next(item for item in told if isinstance(item, StartTrial))
        told = rules.handle(TrialEnded(started.number, "lost", "no memory"))
        if any(isinstance(item, SweepOver) for item in told):
            break
        told = rules.handle(GangReady(gang))
    end = told[-1]
    assert isinstance(end, SweepOver) and end.state == "failed" and "no memory" in end.reason


def test_when_trials_only_fail_the_first_error_is_said_once() -> None:
    rules = SweepRules(num_trials=40, parallel=1)
    rules.begin()
    told = handled(
        rules,
        GangReady(0),
        TrialEnded(0, "failed", "ZeroDivisionError"),
        TrialEnded(1, "failed", "KeyError"),
        TrialEnded(2, "failed", "ValueError"),
    )
    reason = "the first 3 trials have failed. The first error: ZeroDivisionError"
    assert told == [CloseGang(0), SweepOver("failed", reason)]


def test_a_failure_among_others_that_are_done_is_no_end() -> None:
    rules = SweepRules(num_trials=5, parallel=1)
    rules.begin()
    handled(rules, GangReady(0), TrialEnded(0, "done"))
    for number in (1, 2, 3):
        assert rules.handle(TrialEnded(number, "failed", "odd")) == [StartTrial(0, number + 1, 0)]
    assert rules.handle(TrialEnded(4, "failed", "odd"))[-1] == SweepOver("finished", "")


def test_a_metric_that_never_comes_ends_it_at_once() -> None:
    rules = SweepRules(num_trials=40, parallel=2)
    rules.begin()
    handled(rules, GangReady(0), GangReady(1))
    assert rules.handle(TrialEnded(0, "unmeasured", "it logged loss")) == [StopTrial(1), CloseGang(0)]
    assert rules.handle(TrialEnded(1, "stopped"))[-1] == SweepOver("failed", "it logged loss")


def test_stop_ends_what_runs_and_starts_nothing() -> None:
    rules = SweepRules(num_trials=40, parallel=2)
    rules.begin()
    rules.handle(GangReady(0))
    assert rules.handle(SweepStopAsked()) == [StopTrial(0), CloseGang(1)]
    assert rules.handle(SweepStopAsked()) == [StopTrial(0)]  # harder
    assert rules.handle(TrialEnded(0, "stopped")) == [CloseGang(0), SweepOver("stopped", "")]


def test_stop_before_there_are_ranks_ends_at_once() -> None:
    rules = SweepRules(num_trials=4, parallel=1)
    rules.begin()
    assert rules.handle(SweepStopAsked()) == [CloseGang(0), SweepOver("stopped", "")]


def test_when_its_time_is_over_or_all_is_tried_it_has_finished() -> None:
    rules = SweepRules(num_trials=4, parallel=1)
    rules.begin()
    assert handled(rules, GangReady(0), TimeOver()) == [StopTrial(0)]
    assert rules.handle(TrialEnded(0, "stopped"))[-1] == SweepOver("finished", "its time is over.")
    rules = SweepRules(num_trials=40, parallel=1)
    rules.begin()
    assert handled(rules, GangReady(0), Exhausted()) == []
    assert rules.handle(TrialEnded(0, "done"))[-1] == SweepOver("finished", "every combination has been tried.")


def test_when_all_is_tried_and_nothing_of_it_has_a_value_it_has_failed_with_the_first_error() -> None:
    """A grid over numbers without an end refuses its first trial, after which there is nothing more to try."""
    rules = SweepRules(num_trials=40, parallel=1)
    rules.begin()
    rules.handle(GangReady(0))
    assert rules.handle(TrialEnded(0, "failed", "'x' has no end of values")) == [StartTrial(0, 1, 0)]
    ended = handled(rules, Exhausted(), TrialEnded(1, "failed", "the same"))
    assert ended[-1] == SweepOver("failed", "the first 2 trials have failed. The first error: 'x' has no end of values")


def test_ranks_that_cannot_be_had_are_done_without_where_others_are() -> None:
    rules = SweepRules(num_trials=4, parallel=2)
    rules.begin()
    rules.handle(GangReady(0))
    assert rules.handle(GangRefused(1, "there are 2 slots")) == []
    alone = SweepRules(num_trials=4, parallel=1)
    alone.begin()
    assert alone.handle(GangRefused(0, "there are 2 slots")) == [SweepOver("failed", "there are 2 slots")]


def test_what_was_under_way_comes_first_when_a_sweep_goes_on() -> None:
    rules = SweepRules(num_trials=4, parallel=1, num_ended=2, num_measured=2, first_number=3, unfinished=[2])
    rules.begin()
    assert rules.handle(GangReady(0)) == [StartTrial(0, 2, 0)]
    assert rules.handle(TrialEnded(2, "done")) == [StartTrial(0, 3, 0)]
    assert SweepRules(num_trials=2, parallel=1, num_ended=2, num_measured=1).begin() == [SweepOver("finished", "")]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_each_trial_ends_once_and_the_sweep_too(seed: int) -> None:
    rng = random.Random(seed)
    parallel, num_trials = rng.randint(1, 4), rng.randint(1, 12)
    rules = SweepRules(num_trials, parallel)
    opening, running, ended, ends = set[int](), dict[int, int](), list[int](), list[SweepOver]()
    pending = rules.begin()
    for _ in range(500):
        for item in pending:
            match item:
                case OpenGang(gang):
                    opening.add(gang)
                case CloseGang(gang):
                    opening.discard(gang)
                case StartTrial(gang, number, _):
                    assert number not in running and number not in ended and gang not in running.values()
                    running[number] = gang
                case SweepOver():
                    ends.append(item)
        assert len(opening) + len(running) <= parallel
        if ends:
            break
        if opening and (not running or rng.random() < 0.5):
            gang = opening.pop()
            pending = rules.handle(GangReady(gang))
        else:
            number = rng.choice(sorted(running))
            del running[number]
            kind = rng.choice(["done", "done", "pruned", "failed", "lost"])
            if kind != "lost":
                ended.append(number)
            pending = rules.handle(TrialEnded(number, kind, "why"))  # type: ignore[arg-type]
    assert len(ends) == 1 and not running and not opening
    if ends[0].state == "finished":
        assert set(range(num_trials)) >= set(ended)


def test_thousands_of_values_are_told_by_the_hundred_at_the_same_steps_of_every_trial() -> None:
    told = [index for index in range(10_000) if is_reported(index)]
    assert told[:32] == list(range(32)) and len(told) < 200
    assert [index for index in range(500) if is_reported(index)] == [index for index in told if index < 500]


def test_a_pruner_is_read_with_its_settings_and_refused_by_name() -> None:
    assert read_pruner("asha,min=2,reduction=4").settings == {"min": 2, "reduction": 4}
    for text, words in [
        ("ashaa", "Did you mean asha?"),
        ("asha,mni=2", "asha takes min, reduction"),
        ("asha,reduction=1", "at least 2"),
        ("none,min=2", "none takes no settings"),
    ]:
        with pytest.raises(UsageError, match=words.replace("?", r"\?")):
            read_pruner(text)
