"""An elastic run by values: what a lost worker, a new one and the time between make it do."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.core.names import parse_elastic
from jupyter_llmcloud.core.run.lifecycle import Finish
from jupyter_llmcloud.core.run.restarts import AttemptFailure, GiveUp, RestartPolicy, Retry
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
    NoCapacity,
    Note,
    RestartFailed,
    Resume,
    ResumePoint,
    ResumePointFound,
    RunMachine,
    StopAsked,
    StopAttempt,
    TakenOver,
    WorkerJoined,
)
from jupyter_llmcloud.core.scheduling.elasticity import (
    ROOM_RETRY_S,
    SAVE_EVERY_S,
    SAVE_SHARE,
    Elasticity,
    LeaveOut,
    LeaveOutAsked,
    LookForRoom,
    NoMoreRoom,
    Pause,
    RoomFound,
    Save,
    Saved,
    SizeBounds,
    WorkerLoad,
    workers_to_close,
    workers_wanted,
)
from jupyter_llmcloud.core.tick import Tick
from jupyter_llmcloud.errors import UsageError

SLOTS: tuple[dict[str, Any], ...] = ({"home": "there", "num_ranks": 1},)
LOST = Finish("failed", 1, renew=True, dead=(1,))
PAUSED = Finish("stopped", None, renew=True, dead=())
AGENT_LOST = AttemptFinished(LOST, AttemptFailure("death", 1, "RankLost", step=12, is_membership=True))
POINT = ResumePoint("step-8", 8)


def executing(size: int = 2, max_restarts: int = 1, *, saves: bool = False, most: int = 2) -> RunMachine:
    policy = RestartPolicy(max_restarts, is_elastic=True)
    run = RunMachine(policy, elastic=Elasticity(most, size, saves))
    run.handle(AttemptStarted(), 0.0)
    return run


def reshaped(run: RunMachine, size: int, slots: Any = ()) -> Resume:
    """From the search for capacity on: what the run is told when it goes on with so many ranks."""
    assert run.handle(CapacityFound(slots), 1.0) == [Claim()]
    assert run.handle(Claimed(), 1.0) == [AppointStandby(), Heal(slots)]
    assert run.handle(Healed(size), 1.0) == [FindResumePoint()]
    standby, resume = run.handle(ResumePointFound(POINT), 2.0)
    assert standby == AppointStandby()
    assert isinstance(resume, Resume)
    return resume


def test_a_lost_agent_shrinks_the_world_however_often_and_uses_up_no_restart() -> None:
    run = executing()
    for number in range(1, 20):
        assert run.handle(AGENT_LOST, 1.0) == [FindCapacity()], "at once, without a delay"
        resume = reshaped(run, size=1)
        assert (resume.number, resume.is_resize) == (number, True)
    assert resume.note == "rank 1 was lost at step 12; resumed from step 8 on 1 rank"
    assert run.policy.num_restarts == 0


def test_a_rank_that_dies_where_its_agent_lives_uses_up_a_restart_and_numbers_go_on() -> None:
    run = executing()
    run.handle(AGENT_LOST, 1.0)
    reshaped(run, size=1)
    died = AttemptFinished(LOST, AttemptFailure("death", 0, "RankKilled", step=20))
    assert run.handle(died, 3.0) == [FindCapacity()]
    resume = reshaped(run, size=1)
    assert (resume.number, resume.is_resize) == (2, False)
    assert resume.note.endswith("on 1 rank (restart 1 of 1)")
    note, end = run.handle(AttemptFinished(LOST, AttemptFailure("death", 0, "RankKilled", step=30)), 4.0)
    assert note == Note("not executed again: all 1 restarts are used up.")
    assert end == End(LOST)


def test_a_lost_leader_is_a_member_that_has_gone() -> None:
    run = RunMachine(RestartPolicy(1, 1, 4, is_elastic=True), elastic=Elasticity(2, 2))
    assert run.handle(TakenOver(), 0.0) == [AppointStandby(), FindCapacity()], (
        "all its restarts are used up, and it goes on"
    )
    assert reshaped(run, size=1).number == 6


def test_members_that_are_lost_while_ranks_are_replaced_use_up_no_restart_either() -> None:
    run = executing()
    run.handle(AGENT_LOST, 1.0)
    run.handle(CapacityFound(), 1.0)
    run.handle(Claimed(), 1.0)
    assert run.handle(RestartFailed("rank 0 has gone", is_membership=True), 1.0) == [FindCapacity()]
    assert run.policy.num_restarts == 0


def test_a_world_below_its_least_size_waits_for_a_worker() -> None:
    run = executing()
    run.handle(AGENT_LOST, 1.0)
    (note,) = run.handle(NoCapacity("no room"), 1.0)
    assert note == Note("rank 1 was lost at step 12; waits for capacity: no room")
    assert run.handle(WorkerJoined(), 1.5) == [FindCapacity()]


def test_a_run_that_is_smaller_than_it_may_be_looks_for_room_now_and_then_and_when_a_worker_joins() -> None:
    run = executing(size=1)
    assert run.wake_at == ROOM_RETRY_S
    assert run.handle(Tick(), ROOM_RETRY_S) == [LookForRoom()]
    assert run.wake_at is None, "one question at a time"
    assert run.handle(WorkerJoined(), 3.0) == []
    assert run.handle(NoMoreRoom(), 3.0) == []
    assert run.wake_at == 3.0 + ROOM_RETRY_S
    assert run.handle(WorkerJoined(), 3.1) == [LookForRoom()]
    assert executing(size=2).wake_at is None, "no larger than it may be"


def test_room_makes_it_pause_after_a_checkpoint_and_go_on_with_more_ranks() -> None:
    run = executing(size=1)
    run.handle(Tick(), ROOM_RETRY_S)
    assert run.handle(RoomFound(), 2.0) == [Pause()]
    assert run.handle(AttemptFinished(PAUSED), 2.5) == [FindCapacity()]
    resume = reshaped(run, 2, SLOTS)
    assert resume.note == "there is room for more ranks; resumed from step 8 on 2 ranks"
    assert resume.is_resize
    assert run.wake_at is None


SLOW = LeaveOutAsked(1, "rank 1 is slow, its host is left out")


def test_a_slow_host_is_left_out_after_a_checkpoint_and_uses_up_no_restart() -> None:
    run = executing(size=2)
    assert run.handle(SLOW, 1.0) == [Pause()]
    assert run.handle(SLOW, 1.1) == [] and run.rank_left_out == 1, "once"
    assert run.handle(AttemptFinished(PAUSED), 1.5) == [LeaveOut(1), FindCapacity()]
    resume = reshaped(run, 1)
    assert resume.note == "rank 1 is slow, its host is left out; resumed from step 8 on 1 rank"
    assert resume.is_resize and run.policy.num_restarts == 0
    assert run.handle(Tick(), 2.0 + ROOM_RETRY_S) == [LookForRoom()], "other hosts are taken as they come"
    run.handle(RoomFound(), 4.0)
    assert run.handle(AttemptFinished(PAUSED), 4.5) == [FindCapacity()], "that was for room"


def test_a_slow_host_stays_where_no_checkpoint_can_be_had_or_the_run_ends_first() -> None:
    run = executing(size=2)
    run.handle(SLOW, 1.0)
    (note,) = run.handle(NoMoreRoom(), 2.0)
    assert note == Note("rank 1 stays: no checkpoint could be saved with which others go on.")
    run.handle(SLOW, 3.0)
    assert run.handle(AGENT_LOST, 3.5) == [FindCapacity()], "it was lost by itself, under other numbers now"
    run = executing(size=2)
    run.handle(StopAsked(), 1.0)
    assert run.handle(SLOW, 1.1) == []


def test_a_pause_that_cannot_be_had_disturbs_nothing_and_is_tried_again() -> None:
    run = executing(size=1, saves=True)
    run.handle(Tick(), ROOM_RETRY_S)
    run.handle(RoomFound(), 2.0)
    assert run.handle(NoMoreRoom(), 3.0) == []
    assert run.handle(Tick(), 3.0 + ROOM_RETRY_S) == [LookForRoom(), Save()]


def test_a_cell_that_ends_while_it_is_to_pause_has_ended() -> None:
    run = executing(size=1)
    run.handle(Tick(), ROOM_RETRY_S)
    run.handle(RoomFound(), 2.0)
    done = Finish("finished", None, renew=False, dead=())
    assert run.handle(AttemptFinished(done), 2.5) == [End(done)]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_stop_of_somebody_wins_over_a_pause(is_first: bool) -> None:
    run = executing(size=1)
    run.handle(Tick(), ROOM_RETRY_S)
    if is_first:
        run.handle(RoomFound(), 2.0)
    assert run.handle(StopAsked(), 2.0) == [StopAttempt()]
    if not is_first:
        assert run.handle(RoomFound(), 2.0) == []
    assert run.handle(AttemptFinished(PAUSED), 2.5) == [End(PAUSED)]


def test_an_error_of_the_script_ends_an_elastic_run_also_while_it_pauses() -> None:
    run = executing(size=1)
    run.handle(Tick(), ROOM_RETRY_S)
    run.handle(RoomFound(), 2.0)
    failed = Finish("failed", 0, renew=False, dead=())
    assert run.handle(AttemptFinished(failed, AttemptFailure("error", 0, "ValueError")), 2.5)[-1] == End(failed)


def test_it_saves_in_a_rhythm_of_its_own_which_costs_little_time() -> None:
    run = executing(saves=True)
    assert run.handle(Tick(), SAVE_EVERY_S) == [Save()]
    run.handle(Saved(0.01), 3.0)
    assert run.wake_at == 3.0 + SAVE_EVERY_S
    assert run.handle(Tick(), 5.0) == [Save()]
    run.handle(Saved(2.0), 7.0)
    assert run.wake_at == 7.0 + 2.0 / SAVE_SHARE
    assert executing(saves=False).wake_at is None, "it was told another rhythm"


def test_as_many_ranks_as_there_may_be_are_asked_for_beside_those_that_stay() -> None:
    assert SizeBounds(1, 4).to_ask(0) == SizeBounds(1, 4)
    assert SizeBounds(1, 4).to_ask(2) == SizeBounds(0, 2)
    assert SizeBounds(3, 4).to_ask(1) == SizeBounds(2, 3)
    assert SizeBounds.of("") is None
    assert SizeBounds.of("2:5") == SizeBounds(2, 5)


@pytest.mark.parametrize("text", ["", "2", "0:3", "3:2", "a:b", "1:", "1:2:3"])
def test_bounds_that_are_none_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="such as 1:4"):
        parse_elastic(text)
    assert parse_elastic(" 1:4 ") == "1:4"


def test_a_place_that_was_taken_away_as_announced_uses_up_no_restart_of_a_run_that_is_not_elastic() -> None:
    policy = RestartPolicy(max_restarts=1)
    again = policy.handle(AttemptFailure("death", 1, "RankLost", is_membership=True, is_announced=True))
    assert isinstance(again, Retry) and again.is_resize and not again.delay_s
    assert (policy.num_restarts, policy.num_resizes) == (0, 1)
    assert isinstance(policy.handle(AttemptFailure("death", 1, "RankLost", is_membership=True)), Retry)
    assert policy.num_restarts == 1
    assert isinstance(RestartPolicy().handle(AttemptFailure("death", is_announced=True)), GiveUp)


def test_a_run_whose_leader_had_announced_its_end_is_led_on_without_a_restart() -> None:
    run = RunMachine(RestartPolicy(1))
    assert run.handle(TakenOver(False, True), 0.0) == [AppointStandby(), FindCapacity()]
    assert (run.policy.num_restarts, run.policy.num_resizes) == (0, 1)


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([], 0),
        ([WorkerLoad(1, 0, True), WorkerLoad(1, 1, False)], 1),  # one is idle
        ([WorkerLoad(1, 0, True, wants=2), WorkerLoad(1, 1, False)], 3),
        ([WorkerLoad(4, 2, True, wants=2)], 1),  # they fit in beside
        ([WorkerLoad(4, 1, True, wants=6), WorkerLoad(4, 0, True)], 4),
    ],
)
def test_workers_are_wanted_for_what_is_held_and_for_the_ranks_that_elastic_runs_lack(
    loads: list[WorkerLoad], wanted: int
) -> None:
    assert workers_wanted(loads) == wanted


def test_only_workers_that_hold_nothing_are_closed() -> None:
    loads = {"a": WorkerLoad(1, 0, True), "b": WorkerLoad(1, 1, False), "c": WorkerLoad(1, 1, False)}
    assert workers_to_close(loads, 1) == ["b"]
    assert workers_to_close(loads, 3) == ["b", "c"]
    assert workers_to_close(loads, -1) == []


def test_a_batch_that_is_too_large_for_fewer_ranks_than_it_began_with_is_no_error_of_the_script() -> None:
    failure = AttemptFailure("error", 0, "OutOfMemoryError")
    assert failure.is_too_large_for(1, 2)
    assert not failure.is_too_large_for(2, 2)  # as it was written
    assert not failure.is_too_large_for(1, 0)  # not elastic
    assert not AttemptFailure("error", 0, "ValueError").is_too_large_for(1, 2)
    assert SizeBounds(1, 4).above(2) == "3:4"
