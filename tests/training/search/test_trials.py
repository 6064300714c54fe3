"""`trial` on the ranks of a gang, without any: two of them in threads, which meet in a dict in place of the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.storage.search.study import StudyPlan, SweepStudy, optuna
from jupyter_llmcloud.training.search.trials import Trial, forget, unless_pruned

pytest.importorskip("optuna")


class Shared:
    """As much of a store as a trial uses."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


class RankRun:
    """As much of a run as a trial uses."""

    def __init__(self, rank: int) -> None:
        self.id, self.rank, self.world_size = "r", rank, 2
        self.logged: list[tuple[dict[str, float], int | None]] = []

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.logged.append((values, step))


def gang(folder: Path, **options: Any) -> tuple[SweepStudy, list[Trial]]:
    plan = StudyPlan(str(folder / "study.journal"), "tuned", metric="loss", seed=3, **options)
    study = SweepStudy.create(plan)
    study.begin(0)
    shared = Shared()
    told = {"number": 0, "attempt": 0, "plan": asdict(plan)}
    return study, [Trial(told, RankRun(rank), lambda: shared) for rank in range(2)]  # type: ignore[arg-type]


def on_both(trials: list[Trial], cell: Any) -> list[Any]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(cell, trials))


def test_all_ranks_see_what_the_first_one_is_told(tmp_path: Path) -> None:
    study, trials = gang(tmp_path)

    def cell(trial: Trial) -> Any:
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        depth = trial.suggest_int("depth", 1, 9)
        kind = trial.suggest_categorical("kind", [None, "a", 7, True])
        return lr, depth, kind, trial.params

    first, second = on_both(trials, cell)
    assert first == second and first[3] == {"lr": first[0], "depth": first[1], "kind": first[2]} == study.params(0)


def test_choices_may_be_anything_and_are_the_same_objects_in_the_next_trial(tmp_path: Path) -> None:
    study, trials = gang(tmp_path, sampler="random")
    choices = [(64,), (64, 64), dict, len, lambda: 0, lambda: 1, object(), True, "a"]
    for number in range(6):
        if number:
            study.begin(number)
        for trial in trials:
            trial.number = number
        first, second = on_both(trials, lambda trial: trial.suggest_categorical("kind", choices))
        assert first is second and any(first is choice for choice in choices)
        study.end(number, "done", 0.1, 1, {})


def test_what_older_programs_ask_for_is_the_same_number(tmp_path: Path) -> None:
    study, trials = gang(tmp_path)

    def cell(trial: Trial) -> tuple[float, ...]:
        return (
            trial.suggest_uniform("a", 0, 1),
            trial.suggest_loguniform("b", 1e-5, 1),
            trial.suggest_discrete_uniform("c", 0, 1, 0.25),
        )

    first, second = on_both(trials, cell)
    assert first == second == tuple(study.params(0).values()) and first[2] in (0, 0.25, 0.5, 0.75, 1)


def test_all_ranks_end_at_the_step_at_which_the_first_one_is_told_to(tmp_path: Path) -> None:
    study, trials = gang(tmp_path, prune="median,startup=0,warmup=4")
    for step in range(9):
        study.report(0, [(step, 0.1)])
    study.end(0, "done", 0.1, 9, {})
    study.begin(1)
    for trial in trials:
        trial.number = 1

    def cell(trial: Trial) -> int:
        for step in range(9):
            trial.report(5.0, step)
            if trial.should_prune():
                return step
        return -1

    ended = on_both(trials, cell)
    assert ended[0] == ended[1] == 4


def test_ranks_that_ask_for_different_things_are_told_so(tmp_path: Path) -> None:
    _, trials = gang(tmp_path)
    gate = threading.Event()

    def cell(trial: Trial) -> Any:
        try:
            return trial.suggest_float("lr" if trial is trials[0] else "dropout", 0, 1)
        except UsageError as error:
            gate.set()
            return str(error)

    told = on_both(trials, cell)[1]
    assert "rank 1 asked the trial for suggest 'dropout' where rank 0 asked for suggest 'lr'" in told and gate.is_set()


def test_what_the_first_rank_is_refused_fails_on_all(tmp_path: Path) -> None:
    _, trials = gang(tmp_path)

    def cell(trial: Trial) -> str:
        try:
            trial.suggest_float("lr", 1, 0)
        except Exception as error:
            return str(error)
        return ""

    assert all("low" in text for text in on_both(trials, cell))


def test_a_cell_that_ends_itself_as_pruned_has_ended_well(tmp_path: Path) -> None:
    study, trials = gang(tmp_path)
    cell = Execute(world_id="w", run_id="r", name="n", code="", trial={"number": 0})
    assert unless_pruned(optuna().TrialPruned(), cell, {"trial": trials[0]}) is None
    assert study.has_pruned_itself(0)
    error = ValueError("odd")
    assert unless_pruned(error, cell, {"trial": trials[0]}) is error
    pruned = optuna().TrialPruned()
    assert unless_pruned(pruned, cell, {"trial": 1}) is pruned  # the cell has put something else there


def test_the_next_trial_finds_nothing_of_the_one_before() -> None:
    namespace = {"run": 1, "model": 2, "trial": 3}
    forget(namespace, {"run"})
    assert namespace == {"run": 1}
