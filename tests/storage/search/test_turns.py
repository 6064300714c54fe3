"""The turns of a population in a real study: kept before they begin, with values that a trial is given."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.core.search.population import Population
from jupyter_llmcloud.storage.search.study import StudyPlan, SweepStudy
from jupyter_llmcloud.storage.search.turns import RESTORED, SAVED, PlannedTurn, TurnPlanner
from jupyter_llmcloud.training.search.trials import Trial
from tests.storage.search.test_samplers_and_pruners import OneRank

pytest.importorskip("optuna")
TWO = Population(size=2, share=25, resample=0)


def planner(folder: Path, resumes: bool = False, **options: Any) -> tuple[SweepStudy, TurnPlanner]:
    plan = StudyPlan(str(folder / "study.journal"), "tuned", metric="loss", prune="pbt,population=2", **options)
    study = (SweepStudy.reopen if resumes else SweepStudy.create)(plan)
    return study, TurnPlanner(study, TWO, folder)


def asked(study: SweepStudy, turn: PlannedTurn, number: int) -> tuple[Trial, float, str]:
    """The values of a trial, and that it did its part."""
    told = {"number": number, "plan": asdict(study.plan), "turn": turn.as_dict()}
    trial = Trial(told, OneRank(), dict)  # type: ignore[arg-type]
    trial.set_user_attr(SAVED, True)
    trial.set_user_attr(RESTORED, turn.parent is not None)
    values = trial.suggest_float("lr", 1e-4, 1.0, log=True), trial.suggest_categorical("kind", ["a", "b"])
    trial.suggest_int("width", 8, 64)
    trial.keep("width")
    return trial, *values


def test_a_member_goes_on_with_its_values_and_the_worst_near_those_of_the_best(tmp_path: Path) -> None:
    study, turns = planner(tmp_path, seed=1)
    seen = []
    for number, loss in enumerate([0.5, 0.9, 0.4, 0.3]):
        turn = turns.begin(number)
        trial, lr, kind = asked(study, turn, number)
        assert (trial.generation, trial.parent) == (number // 2, turn.parent)
        seen.append((turn.parent, lr, kind))
        assert turns.why_incomplete(number) == ""
        study.end(number, "done", loss, 1, {})
    (_, lr, kind), _, own, taken = seen
    assert own == (0, lr, kind) and taken[0] == 0 and taken[2] == kind
    assert any(taken[1] == pytest.approx(near) for near in (min(1.0, 1.25 * lr), 0.8 * lr))
    assert study.params(3) == {"lr": taken[1], "kind": kind, "width": study.params(0)["width"]}


def test_what_was_decided_is_kept_for_a_turn_that_is_run_again(tmp_path: Path) -> None:
    study, turns = planner(tmp_path)  # no seed: nothing could be decided twice the same
    for number in range(2):
        asked(study, turns.begin(number), number)
        study.end(number, "done", float(number), 1, {})
    first = turns.begin(3 - 1), turns.begin(3)
    study, turns = planner(tmp_path, resumes=True)
    assert (turns.begin(2), turns.begin(3)) == first
    values = asked(study, first[1], 3)[1:]
    assert asked(study, turns.begin(3), 3)[1:] == values


def test_states_are_let_go_when_nothing_goes_on_from_them(tmp_path: Path) -> None:
    study, turns = planner(tmp_path, seed=1)
    for number in range(5):
        asked(study, turns.begin(number), number)
        study.end(number, "done", float(number), 1, {})
    assert sorted(path.name for path in (tmp_path / "population").iterdir()) == ["0002", "0003", "0004"]


def test_a_trial_that_leaves_no_state_or_begins_anew_is_told_so(tmp_path: Path) -> None:
    study, turns = planner(tmp_path, seed=1)
    turns.begin(0)
    assert "trial 0 has left no state" in turns.why_incomplete(0)
    asked(study, turns.begin(0), 0)
    study.end(0, "done", 1.0, 1, {})
    turns.begin(1)
    study.end(1, "failed", None, None, {})
    turns.begin(2)
    assert "trial 2 was to go on from the state of trial 0, and began anew" in turns.why_incomplete(2)
