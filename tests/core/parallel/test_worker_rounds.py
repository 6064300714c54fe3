"""Rounds of workers that train against a parameter server: by values."""

from __future__ import annotations

from jupyter_llmcloud.core.parallel.worker_rounds import WorkerRounds


def finish(rounds: WorkerRounds, worker: int, times: int = 1, steps: int = 8, seconds: float = 1.0) -> None:
    for _ in range(times):
        rounds.finish(worker, steps, seconds)


def test_a_worker_waits_for_those_that_are_too_far_behind() -> None:
    rounds = WorkerRounds(3, 8, staleness=2)
    finish(rounds, 0, 2)
    assert rounds.may_go_on(0)
    finish(rounds, 0)
    assert not rounds.may_go_on(0)
    finish(rounds, 1)
    assert not rounds.may_go_on(0)
    finish(rounds, 2)
    assert rounds.may_go_on(0)


def test_without_staleness_all_workers_go_on_together() -> None:
    rounds = WorkerRounds(2, 8, staleness=0)
    finish(rounds, 0)
    assert not rounds.may_go_on(0)
    finish(rounds, 1)
    assert rounds.may_go_on(0) and rounds.may_go_on(1)


def test_nobody_waits_for_a_worker_that_is_done_or_lost() -> None:
    rounds = WorkerRounds(3, 8, staleness=0)
    finish(rounds, 0, 5)
    rounds.end(1)
    assert not rounds.may_go_on(0)
    rounds.lose(2)
    assert rounds.may_go_on(0)
    assert rounds.live == [0, 1] and rounds.training == [0] and rounds.lost == [2]


def test_steps_are_in_proportion_to_speed() -> None:
    rounds = WorkerRounds(3, 8, staleness=2)
    assert rounds.num_steps(0) == 8  # no speed is known
    finish(rounds, 0, seconds=1)
    finish(rounds, 1, seconds=2)
    finish(rounds, 2, seconds=100)
    assert [rounds.num_steps(worker) for worker in range(3)] == [8, 4, 1]


def test_a_busy_moment_changes_no_round() -> None:
    rounds = WorkerRounds(2, 8, staleness=2)
    finish(rounds, 0, seconds=1.0)
    finish(rounds, 1, seconds=1.08)
    assert rounds.num_steps(1) == 8


def test_the_fastest_worker_that_is_left_sets_the_pace() -> None:
    rounds = WorkerRounds(2, 8, staleness=2)
    finish(rounds, 0, seconds=1)
    finish(rounds, 1, seconds=4)
    assert rounds.num_steps(1) == 2
    rounds.lose(0)
    assert rounds.num_steps(1) == 8


def test_nobody_waits_for_a_worker_that_waits_for_all() -> None:
    rounds = WorkerRounds(2, 8, staleness=0)
    finish(rounds, 0, 3)
    rounds.wait(1, True)
    assert rounds.may_go_on(0)
    rounds.wait(1, False)
    assert not rounds.may_go_on(0)
