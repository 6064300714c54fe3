"""Samplers and pruners on real studies, with a trial's own code and no ranks: what is proposed, who is ended when."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.search import study as studies
from jupyter_llmcloud.storage.search.study import StudyPlan, SweepStudy
from jupyter_llmcloud.training.search.trials import Trial

pytest.importorskip("optuna")
Cell = Callable[[Trial], float]


class OneRank:
    """As much of a run as a trial of one rank uses."""

    id, rank, world_size = "r", 0, 1

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        pass


def new_study(folder: Path, **options: Any) -> SweepStudy:
    folder.mkdir(exist_ok=True)
    return SweepStudy.create(StudyPlan(str(folder / "study.journal"), "tuned", metric="loss", **options))


def begin(study: SweepStudy, number: int) -> Trial:
    study.begin(number)
    return Trial({"number": number, "plan": asdict(study.plan)}, OneRank(), dict)  # type: ignore[arg-type]


def searched(study: SweepStudy, cell: Cell, trials: int) -> list[float]:
    """The values of trials, one after the other, until the sampler has nothing new."""
    values = []
    for number in range(trials):
        values.append(cell(begin(study, number)))
        study.end(number, "done", values[-1], 1, {})
        if study.is_exhausted:
            break
    return values


def bowl(trial: Trial) -> float:
    """Least where x is 0.5 and y is 0.01."""
    x, y = trial.suggest_float("x", -2, 2), trial.suggest_float("y", 1e-4, 1, log=True)
    assert -2 <= x <= 2 and 1e-4 <= y <= 1
    return (x - 0.5) ** 2 + (math.log10(y) + 2) ** 2


@pytest.mark.parametrize(
    ("sampler", "trials", "learns"),
    [("tpe", 24, 0.5), ("cmaes", 28, 0.7), pytest.param("gp", 12, 0.5, marks=pytest.mark.soak)],
)
def test_a_sampler_that_learns_proposes_better_in_the_end(
    tmp_path: Path, sampler: str, trials: int, learns: float
) -> None:
    values = searched(new_study(tmp_path, sampler=sampler, seed=3), bowl, trials)
    assert len({*values}) == trials
    assert sum(sorted(values[-4:])[:2]) / 2 < learns * sum(values[:10]) / 10


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_seed_gives_the_same_values_again_and_each_trial_others(tmp_path: Path, sampler: str) -> None:
    first, second = (searched(new_study(tmp_path / name, sampler=sampler, seed=7), bowl, 6) for name in "ab")
    third = searched(new_study(tmp_path / "c", sampler=sampler, seed=8), bowl, 6)
    assert first == second and len({*first, *third}) == 12


def test_every_combination_comes_once_and_no_further_one(tmp_path: Path) -> None:
    seen = []

    def cell(trial: Trial) -> float:
        seen.append((trial.suggest_float("x", 0, 1, step=0.5), trial.suggest_categorical("kind", ["a", None])))
        return 1.0

    study = new_study(tmp_path, sampler="grid", seed=1)
    searched(study, cell, 40)
    assert study.is_exhausted and sorted(seen, key=repr) == sorted(
        [(x, kind) for x in (0.0, 0.5, 1.0) for kind in ("a", None)], key=repr
    )


def test_values_without_end_are_refused_by_a_search_of_every_combination(tmp_path: Path) -> None:
    trial = begin(new_study(tmp_path, sampler="grid"), 0)
    with pytest.raises(UsageError, match=r"'lr' has no end of values between 0.001 and 0.1: give it step="):
        trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    assert trial.suggest_float("same", 2, 2) == 2.0


def test_cma_es_without_numbers_says_so_after_the_first_trial_which_is_kept(tmp_path: Path) -> None:
    study = new_study(tmp_path, sampler="cmaes", seed=1)
    with pytest.raises(UsageError, match=r"needs numbers to search.*asked for kind, fixed only.*--sampler tpe"):
        searched(
            study, lambda trial: float(trial.suggest_categorical("kind", [1, 2])) + trial.suggest_int("fixed", 3, 3), 2
        )
    assert study.states() == {0: "COMPLETE"}
    mixed = new_study(tmp_path / "mixed", sampler="cmaes", seed=1)
    searched(mixed, lambda trial: bowl(trial) + trial.suggest_categorical("kind", [0, 1]), 3)


@pytest.mark.parametrize(("sampler", "module"), [("gp", "scipy"), ("cmaes", "cmaes")])
def test_what_a_sampler_needs_and_does_not_find_is_named_before_any_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, module: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(studies.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(
        UsageError, match=f"--sampler {sampler} needs {module}, which is not installed here: pip install"
    ):
        new_study(tmp_path, sampler=sampler)


def test_without_optuna_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> Any:
        if name == "optuna":
            raise ModuleNotFoundError("No module named 'optuna'", name="optuna")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UsageError, match=r"pip install 'jupyter-llmcloud\[search\]'"):
        new_study(tmp_path)


# --- pruners ---


def pruned_at(study: SweepStudy, curves: list[Callable[[int], float]], steps: int) -> list[int | None]:
    """The step at which each trial is ended; trials go one after the other, told one value at a time."""
    ended: list[int | None] = []
    for number, curve in enumerate(curves):
        study.begin(number)
        at = next((step for step in range(1, steps + 1) if study.report(number, [(step, curve(step))])), None)
        study.end(number, "done" if at is None else "pruned", curve(at or steps), at or steps, {})
        ended.append(at)
    return ended


def flat(value: float) -> Callable[[int], float]:
    return lambda step: value


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(
    ("prune", "curves", "ended"),
    [
        # Rungs at steps 2, 6, 18: the best third goes on.
        ("asha,min=2,reduction=3", [1, 2, 3, 0, 4], [None, 2, 2, None, 2]),
        ("median,startup=2,warmup=3", [1, 2, 5, 0, 1.25, 0.5], [None, None, 3, None, 3, None]),
        ("median", [1, 1, 1, 1, 1, 9], [None] * 5 + [1]),
        ("none", [1, 2, 3], [None] * 3),
    ],
)
def test_trials_that_fall_behind_are_ended_at_their_rung(
    tmp_path: Path, direction: str, prune: str, curves: list[float], ended: list[int | None]
) -> None:
    sign = 1 if direction == "minimize" else -1
    study = new_study(tmp_path, prune=prune, direction=direction)
    assert pruned_at(study, [flat(sign * value) for value in curves], 20) == ended
    states = ["COMPLETE" if at is None else "PRUNED" for at in ended]
    assert [*study.states().values()] == states


def test_patience_ends_a_trial_that_has_grown_worse_for_so_many_steps(tmp_path: Path) -> None:
    study = new_study(tmp_path, prune="patient,patience=3")
    falls: Callable[[int], float] = lambda step: 1 / step  # noqa: E731
    worse_from_6: Callable[[int], float] = lambda step: 1 / step if step < 6 else float(step)  # noqa: E731
    assert pruned_at(study, [falls, worse_from_6, falls], 20) == [None, 9, None]


def test_hyperband_ends_those_behind_in_each_bracket_and_keeps_the_best(tmp_path: Path) -> None:
    study = new_study(tmp_path, prune="hyperband,min=1,max=9,reduction=3", sampler="random", seed=1)
    ended = pruned_at(study, [flat(float(number)) for number in range(12)], 9)
    assert ended[0] is None and sum(at is not None for at in ended) >= 4
    assert {at for at in ended if at is not None} <= {1, 3, 9}


def test_a_trial_asks_its_pruner_on_its_own_too(tmp_path: Path) -> None:
    study = new_study(tmp_path, prune="asha,min=2,reduction=2")
    for number in range(3):
        trial = begin(study, number)
        for step in range(1, 9):
            trial.report(float(number), step)
            if trial.should_prune():
                break
        study.end(number, "done" if step == 8 else "pruned", float(number), step, {})
    assert [*study.states().values()] == ["COMPLETE", "PRUNED", "PRUNED"]
