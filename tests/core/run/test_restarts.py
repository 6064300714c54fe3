"""Whether a broken run is executed again: rules tested by values."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.run.restarts import MAX_DELAY_S, AttemptFailure, GiveUp, RestartPolicy, Retry, kind_of

DEATH = AttemptFailure("death", 1, "RankKilled", step=37)


def error(step: int, ename: str = "ValueError", **more: bool) -> AttemptFailure:
    return AttemptFailure("error", 0, ename, step, **more)


def test_nothing_is_executed_again_unless_that_was_asked_for() -> None:
    assert RestartPolicy().handle(DEATH) == GiveUp()


@pytest.mark.parametrize("kind", ["death", "echo"])
def test_a_lost_rank_or_group_is_nobodys_mistake_and_is_tried_again_at_once(kind: str) -> None:
    assert RestartPolicy(3).handle(AttemptFailure(kind, 1, step=5)) == Retry(1, 0.0)


def test_the_restarts_of_a_run_are_counted() -> None:
    policy = RestartPolicy(2)
    assert [policy.handle(AttemptFailure("death", 1, step=step)) for step in (5, 9)] == [Retry(1, 0.0), Retry(2, 0.0)]
    decision = policy.handle(AttemptFailure("death", 1, step=20))
    assert isinstance(decision, GiveUp)
    assert "2 restarts" in decision.why


def test_without_progress_each_restart_waits_longer_up_to_a_limit() -> None:
    policy = RestartPolicy(20)
    delays = [decision.delay_s for _ in range(10) if isinstance(decision := policy.handle(DEATH), Retry)]
    assert delays[:5] == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert delays[-1] == MAX_DELAY_S
    assert policy.handle(AttemptFailure("death", 1, step=38)) == Retry(11, 0.0)


@pytest.mark.parametrize("step", [0, 12])
def test_an_error_of_the_script_ends_the_run_and_uses_up_no_restart(step: int) -> None:
    policy = RestartPolicy(9)
    decision = policy.handle(error(step))
    assert isinstance(decision, GiveUp)
    assert "ValueError is an error of the script" in decision.why
    assert policy.num_restarts == 0


@pytest.mark.parametrize(
    ("evalue", "kind"),
    [
        ("DataLoader worker (pid 4711) is killed by signal: Killed. ", "death"),
        ("DataLoader worker (pid 4711) is killed by signal: Terminated. ", "death"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "death"),
        ("Caught ValueError in DataLoader worker process 0.\nbad sample", "error"),
        ("bad sample", "error"),
    ],
)
def test_a_loaders_worker_that_died_is_a_death_and_an_exception_in_it_is_not(evalue: str, kind: str) -> None:
    assert kind_of(False, False, evalue) == kind
    assert kind_of(True, False, evalue) == "death"
    assert kind_of(False, True, "Connection closed by peer") == "echo"


def test_a_cell_that_fails_on_its_way_to_the_resume_point_runs_from_its_start_from_then_on() -> None:
    policy = RestartPolicy(9)
    assert policy.handle(error(0, "ZeroDivisionError", replaying=True)) == Retry(1, 0.0, from_start=True)
    decision = policy.handle(DEATH)
    assert isinstance(decision, Retry)
    assert decision.from_start


def test_running_out_of_memory_twice_is_the_end() -> None:
    policy = RestartPolicy(9)
    oom = AttemptFailure("death", 0, "RankOutOfMemory", 3)
    assert isinstance(policy.handle(oom), Retry)
    assert isinstance(policy.handle(AttemptFailure("death", 1, "RankOutOfMemory", 8)), GiveUp)


def test_the_words_name_the_rank_what_happened_and_the_step() -> None:
    assert DEATH.message == "rank 1 was killed at step 37"
    assert error(4).message == "rank 0 raised ValueError at step 4"
    assert AttemptFailure("echo", 0, step=4).message == "rank 0 lost its connection at step 4"
