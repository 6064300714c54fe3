"""Where a run goes back to after an alert, and what it leaves out then."""

from __future__ import annotations

import math
import random

import pytest

from jupyter_llmcloud.core.detect.rollback import APART, MAX_IN_A_ROW, Rollback, RollbackRule
from jupyter_llmcloud.core.detect.run_detectors import RunDetectors, policies, rolls_back
from jupyter_llmcloud.core.run.lifecycle import Finish
from jupyter_llmcloud.core.run.restarts import AttemptFailure, RestartPolicy
from jupyter_llmcloud.core.run.run_machine import (
    AppointStandby,
    AttemptFinished,
    AttemptStarted,
    CapacityFound,
    Claim,
    Claimed,
    End,
    FindCapacity,
    FindResumePoint,
    Heal,
    Healed,
    RestartFailed,
    Resume,
    ResumePoint,
    ResumePointFound,
    RollbackAsked,
    RunMachine,
    StopAsked,
    StopAttempt,
)
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.core.tick import Tick
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.run_request import execute

BACK = Rollback("loss jumped", before=57, last=59)
STOPPED = Finish("stopped", None, renew=True, dead=())


def executing(max_restarts: int = 3) -> RunMachine:
    run = RunMachine(RestartPolicy(max_restarts))
    assert run.handle(AttemptStarted(), 0.0) == []
    return run


def test_the_steps_between_the_last_good_value_and_the_bad_one_are_left_out_wherever_the_loop_logs() -> None:
    found = RollbackRule().decide("loss jumped", good=57, seen=58)
    assert found == BACK
    assert found.left_out(50) == (58, 59) and found.left_out(None) == (58, 59)


def test_what_comes_again_at_once_leaves_out_all_since_the_checkpoint_and_is_not_tried_for_ever() -> None:
    rule = RollbackRule([(58, 59)])
    again = rule.decide("loss jumped", good=60, seen=61)
    assert again is not None and again.is_repeated and again.left_out(50) == (51, 62)
    assert again.left_out(None) == (61, 62)  # from its start all of it would leave nothing
    tries = [rule.decide("loss jumped", good=62 + n, seen=63 + n) for n in range(MAX_IN_A_ROW)]
    assert [found is not None for found in tries] == [True] * (MAX_IN_A_ROW - 1) + [False]


def test_what_comes_much_later_is_another_matter() -> None:
    rule = RollbackRule()
    for number in range(10 * MAX_IN_A_ROW):
        found = rule.decide("loss jumped", good=number * (APART + 9), seen=number * (APART + 9) + 1)
        assert found is not None and not found.is_repeated


def test_a_run_goes_back_to_a_good_checkpoint_without_using_up_a_restart() -> None:
    run, point = executing(), ResumePoint("step-50", 50)
    assert run.handle(RollbackAsked(BACK), 1.0) == [StopAttempt()]
    assert run.handle(RollbackAsked(BACK), 1.0) == []
    assert run.handle(AttemptFinished(STOPPED), 2.0) == [FindCapacity()]
    assert run.handle(CapacityFound(), 2.0) == [Claim()]
    assert run.handle(Claimed(), 2.0) == [AppointStandby(), Heal()]
    assert run.handle(Healed(), 2.0) == [FindResumePoint(before=57)]
    standby, resume = run.handle(ResumePointFound(point), 2.0)
    note = "loss jumped; resumed from step 50; steps 58 to 59 are left out"
    assert resume == Resume(1, point, note, is_rollback=True, left_out=(58, 59)) and standby == AppointStandby()
    assert (run.policy.num_restarts, run.policy.num_rollbacks) == (0, 1)
    again = run.handle(AttemptFinished(Finish("failed", 1, renew=True, dead=(1,)), AttemptFailure("death", 1)), 3.0)
    assert again == [FindCapacity()] and run.policy.num_restarts == 1


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_an_attempt_that_ends_by_itself_meanwhile_is_gone_back_from_as_well(state: str) -> None:
    run = executing()
    run.handle(RollbackAsked(BACK), 1.0)
    assert run.handle(AttemptFinished(Finish(state, None, renew=False, dead=())), 2.0) == [FindCapacity()]


def test_a_stop_that_somebody_presses_meanwhile_ends_the_run() -> None:
    run = executing()
    run.handle(RollbackAsked(BACK), 1.0)
    run.handle(StopAsked(), 1.5)
    assert run.handle(AttemptFinished(STOPPED), 2.0) == [End(STOPPED)]
    assert run.handle(RollbackAsked(BACK), 3.0) == []


def test_ranks_that_cannot_be_had_at_first_do_not_make_it_forget_where_it_goes_back_to() -> None:
    run = executing()
    for event in (RollbackAsked(BACK), AttemptFinished(STOPPED), CapacityFound(), Claimed(), RestartFailed("no")):
        run.handle(event, 1.0)
    for later in (Tick(), CapacityFound(), Claimed()):
        run.handle(later, 100.0)
    assert run.handle(Healed(), 100.0) == [FindResumePoint(before=57)]


def records(values: list[float], first: int = 0) -> list[dict[str, object]]:
    return [{"step": first + n, "at": first + n + 1, "values": {"loss": value}} for n, value in enumerate(values)]


def falling(num: int) -> list[float]:
    noise = random.Random(5)
    return [math.exp(1 - step / 300 + noise.gauss(0, 0.1)) for step in range(num)]


def test_an_alert_tells_between_which_optimizer_steps_it_came_and_what_was_seen_before_is_no_news() -> None:
    watch = RunDetectors("loss-spike=rollback,not-finite=rollback")
    values = falling(200)
    assert watch.metrics(0, records(values)) == [] and watch.good_step == 200
    [spike] = watch.metrics(0, records([values[-1] * 50], 200))
    assert spike.detector == "loss-spike" and spike.between == (200, 201) and watch.good_step == 200
    watch.begin_attempt()
    assert watch.metrics(0, records([values[-1] * 50, math.nan], 200), seen_until=202) == []
    [bad] = watch.metrics(0, records([math.nan, math.nan], 202), seen_until=202)
    assert (bad.detector, bad.between, bad.text) == ("not-finite", (200, 203), "loss is NaN at step 202")


def test_only_a_loss_or_a_gradient_norm_can_be_gone_back_from_and_only_a_slow_host_left_out() -> None:
    assert rolls_back("loss-spike=rollback") and not rolls_back("loss-spike=stop") and not rolls_back(None)
    with pytest.raises(UsageError, match="expected straggler= with one of note, stop, off"):
        policies("straggler=rollback")
    assert policies("straggler=scale") == {"straggler": "scale"}
    with pytest.raises(UsageError, match="expected loss-spike= with one of note, stop, off, rollback"):
        policies("loss-spike=scale")


def test_a_run_that_may_go_back_has_checkpoints_and_is_executed_again() -> None:
    about = {"world_id": "w", "run_id": "r", "name": "r", "code": ""}
    request = execute(RunSpec(watch="loss-spike=rollback"), **about)
    assert request.checkpoint_every and request.max_restarts
    with pytest.raises(UsageError, match=r"straggler=scale is for a run with --elastic MIN:MAX.*--balance"):
        execute(RunSpec(watch="straggler=scale"), **about)
    assert execute(RunSpec(watch="straggler=scale", elastic="1:2"), **about).elastic == "1:2"
    with pytest.raises(UsageError, match="powersgd"):
        execute(RunSpec(watch="loss-spike=rollback", compress_gradients="powersgd"), **about)
