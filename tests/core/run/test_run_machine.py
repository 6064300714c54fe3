"""The life of a run over all its attempts, by values: events in, instructions out, time as an argument."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from jupyter_llmcloud.core.detect.rollback import Rollback
from jupyter_llmcloud.core.run.lifecycle import Finish
from jupyter_llmcloud.core.run.restarts import AttemptFailure, RestartPolicy
from jupyter_llmcloud.core.run.run_machine import (
    CAPACITY_RETRY_S,
    AppointStandby,
    AttemptFinished,
    AttemptStarted,
    CapacityFound,
    Claim,
    Claimed,
    ClaimFailed,
    End,
    Event,
    FindCapacity,
    FindResumePoint,
    HandOver,
    Heal,
    Healed,
    Instruction,
    LeadLost,
    LeaveAsked,
    MachinePhase,
    NoCapacity,
    Note,
    RestartFailed,
    Resume,
    ResumePoint,
    ResumePointFound,
    RollbackAsked,
    RunMachine,
    StandbyLost,
    StopAsked,
    StopAttempt,
    TakenOver,
    TimeOut,
    WorkerJoined,
)
from jupyter_llmcloud.core.tick import Tick

SLOTS: tuple[dict[str, Any], ...] = ({"home": "there", "num_ranks": 1},)
FINISHED = Finish("finished", None, renew=False, dead=())
STOPPED = Finish("stopped", None, renew=True, dead=())
DIED = Finish("failed", 1, renew=True, dead=(1,))
KILLED = AttemptFailure("death", 1, "RankKilled", step=12)
DIES = AttemptFinished(DIED, KILLED)
POINT = ResumePoint("step-8", 8)
WHY = "rank 1 was killed at step 12"
GO_BACK = RollbackAsked(Rollback("loss jumped", 8, 10))


def executing(max_restarts: int = 3, **more: Any) -> RunMachine:
    run = RunMachine(RestartPolicy(max_restarts), **more)
    assert run.handle(AttemptStarted(), 0.0) == []
    return run


def feed(run: RunMachine, *events: Event, now: float = 10.0, **more: float) -> list[Instruction]:
    """The instructions of several events at one time."""
    return [out for event in events for out in run.handle(event, now, **more)]


def in_phase(phase: MachinePhase) -> RunMachine:
    """A run whose rank has died, so far on its way to its next attempt."""
    run = executing()
    ways: dict[MachinePhase, list[Event]] = {
        MachinePhase.EXECUTING: [],
        MachinePhase.FINDING_CAPACITY: [DIES],
        MachinePhase.WAITING_FOR_CAPACITY: [DIES, NoCapacity("full")],
        MachinePhase.CLAIMING: [DIES, CapacityFound(SLOTS)],
        MachinePhase.HEALING: [DIES, CapacityFound(SLOTS), Claimed()],
        MachinePhase.LOOKING: [DIES, CapacityFound(SLOTS), Claimed(), Healed()],
        MachinePhase.BACKING_OFF: [DIES, CapacityFound(SLOTS), Claimed(), RestartFailed("no"), *again(), DIES],
    }
    feed(run, *ways[phase])
    assert run.phase is phase, run.phase
    return run


def again() -> list[Event]:
    """All goes well from the search for capacity to the next attempt."""
    return [CapacityFound(), Claimed(), Healed(), ResumePointFound(POINT)]


BETWEEN = [
    MachinePhase.BACKING_OFF,
    MachinePhase.FINDING_CAPACITY,
    MachinePhase.WAITING_FOR_CAPACITY,
    MachinePhase.CLAIMING,
    MachinePhase.HEALING,
    MachinePhase.LOOKING,
]


@pytest.fixture(params=BETWEEN, ids=lambda phase: phase.value)
def between(request: pytest.FixtureRequest) -> RunMachine:
    """A run in any phase between two attempts."""
    return in_phase(request.param)


# --- an attempt ends ---


@pytest.mark.parametrize("finish", [FINISHED, STOPPED, DIED], ids=lambda finish: finish.state)
def test_a_run_without_restarts_ends_as_its_attempt_did_and_says_nothing_more(finish: Finish) -> None:
    broken = KILLED if finish is DIED else None
    assert feed(executing(max_restarts=0), AttemptFinished(finish, broken)) == [End(finish)]


@pytest.mark.parametrize("finish", [FINISHED, STOPPED])
def test_an_attempt_that_did_not_fail_is_the_last(finish: Finish) -> None:
    assert feed(executing(), AttemptFinished(finish)) == [End(finish)]


def test_a_run_that_broke_is_executed_again_from_its_newest_checkpoint_step_by_step() -> None:
    run = executing()
    assert feed(run, DIES) == [FindCapacity()]
    assert feed(run, CapacityFound(SLOTS)) == [Claim()]
    assert feed(run, Claimed()) == [AppointStandby(), Heal(SLOTS)], "while it heals, too, others are to stand by"
    assert feed(run, Healed()) == [FindResumePoint()]
    note = f"{WHY}; resumed from step 8 (restart 1 of 3)"
    assert feed(run, ResumePointFound(POINT)) == [AppointStandby(), Resume(1, POINT, note)]
    assert run.phase is MachinePhase.EXECUTING
    assert feed(run, AttemptFinished(FINISHED)) == [End(FINISHED)]


def test_without_a_checkpoint_it_is_executed_from_its_start() -> None:
    run = in_phase(MachinePhase.LOOKING)
    _, resume = feed(run, ResumePointFound(None))
    assert resume == Resume(1, None, f"{WHY}; executed again from its start (restart 1 of 3)")


def test_a_cell_that_cannot_be_led_back_is_not_asked_for_its_checkpoint() -> None:
    run = executing()
    failed = AttemptFinished(DIED, AttemptFailure("error", 1, "ZeroDivisionError", replaying=True))
    out = feed(run, failed, CapacityFound(), Claimed(), Healed())
    assert FindResumePoint() not in out
    assert isinstance(resume := out[-1], Resume)
    assert resume.point is None


def test_restarts_that_are_used_up_are_said() -> None:
    run = executing(max_restarts=1)
    feed(run, DIES, *again())
    out = feed(run, AttemptFinished(DIED, AttemptFailure("death", 1, step=20)))
    assert out == [Note("not executed again: all 1 restarts are used up."), End(DIED)]


def test_an_attempt_without_progress_is_followed_by_a_delay_that_a_tick_ends() -> None:
    run = executing()
    feed(run, DIES, *again())
    assert feed(run, DIES) == []
    assert (run.phase, run.wake_at) == (MachinePhase.BACKING_OFF, 11.0)
    assert feed(run, Tick(), now=10.9) == []
    assert feed(run, Tick(), now=11.0) == [FindCapacity()]
    assert run.wake_at is None


# --- capacity ---


def test_a_restart_that_waits_for_capacity_asks_again_and_uses_up_no_restart() -> None:
    run = in_phase(MachinePhase.FINDING_CAPACITY)
    for number in range(50):
        now = 10.0 + number
        feed(run, NoCapacity("full"), now=now)
        assert run.wake_at == now + CAPACITY_RETRY_S
        assert feed(run, Tick(), now=now + CAPACITY_RETRY_S) == [FindCapacity()]
    _, resume = feed(run, *again())[-2:]
    assert isinstance(resume, Resume)
    assert resume.number == 1
    assert run.policy.num_restarts == 1


def test_why_a_run_waits_is_said_once_for_each_reason() -> None:
    run = in_phase(MachinePhase.FINDING_CAPACITY)
    assert feed(run, NoCapacity("full")) == [Note(f"{WHY}; waits for capacity: full")]
    assert feed(run, Tick(), NoCapacity("full"), now=11) == [FindCapacity()]
    assert feed(run, Tick(), NoCapacity("fuller"), now=12)[-1] == Note(f"{WHY}; waits for capacity: fuller")


def test_a_worker_that_joins_is_asked_at_once() -> None:
    run = in_phase(MachinePhase.WAITING_FOR_CAPACITY)
    assert feed(run, WorkerJoined()) == [FindCapacity()]
    assert run.wake_at is None


def test_a_worker_that_joins_at_any_other_time_changes_nothing() -> None:
    for phase in set(BETWEEN) - {MachinePhase.WAITING_FOR_CAPACITY} | {MachinePhase.EXECUTING}:
        assert feed(in_phase(phase), WorkerJoined()) == []


def test_slots_that_were_taken_by_others_meanwhile_are_looked_for_again_under_another_claim() -> None:
    """Who stood by in the term of the first one may have been lost since."""
    run = in_phase(MachinePhase.HEALING)
    assert feed(run, NoCapacity("taken")) == [Note(f"{WHY}; waits for capacity: taken")]
    assert feed(run, Tick(), now=11) == [FindCapacity()]
    others = ({"home": "elsewhere", "num_ranks": 1},)
    assert feed(run, CapacityFound(others), Claimed()) == [Claim(), AppointStandby(), Heal(others)]


# --- a restart fails ---


@pytest.mark.parametrize("phase", [MachinePhase.FINDING_CAPACITY, MachinePhase.HEALING, MachinePhase.LOOKING])
def test_a_restart_that_fails_is_followed_by_another_under_a_new_claim(phase: MachinePhase) -> None:
    run = in_phase(phase)
    assert feed(run, RestartFailed("no store.")) == [], "it has made no progress: later"
    assert feed(run, Tick(), CapacityFound(), now=11.0) == [FindCapacity(), Claim()]
    _, resume = feed(run, Claimed(), Healed(), ResumePointFound(POINT))[-2:]
    assert resume == Resume(2, POINT, "the ranks could not be replaced: no store; resumed from step 8 (restart 2 of 3)")


def test_the_last_restart_that_fails_ends_the_run_with_its_reason() -> None:
    run = executing(max_restarts=1)
    failed = Finish("failed", None, renew=True, dead=())
    out = feed(run, DIES, CapacityFound(), Claimed(), RestartFailed("rank 0 could not join."))
    assert out[-2:] == [Note("not executed again: rank 0 could not join."), End(failed)]


def test_restarts_that_fail_again_and_again_wait_longer_and_longer() -> None:
    run = executing(max_restarts=9)
    feed(run, DIES)
    now, delays = 10.0, []
    for _ in range(5):
        feed(run, RestartFailed("no"), now=now)
        assert run.wake_at is not None
        delays.append(run.wake_at - now)
        now = run.wake_at
        feed(run, Tick(), now=now)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0]


# --- who leads ---


@pytest.mark.parametrize("phase", [MachinePhase.EXECUTING, *BETWEEN], ids=lambda phase: phase.value)
def test_a_run_that_another_agent_leads_is_handed_over_at_any_time(phase: MachinePhase) -> None:
    run = in_phase(phase)
    assert feed(run, LeadLost()) == [HandOver()]
    assert run.wake_at is None
    late: list[Event] = [DIES, CapacityFound(SLOTS), Claimed(), Healed(), ResumePointFound(POINT), StopAsked(), Tick()]
    assert feed(run, *late, now=999) == [], "nothing more is written or told here"


def test_a_term_that_somebody_else_claimed_first_ends_the_restart_before_any_rank_is_started() -> None:
    run = in_phase(MachinePhase.FINDING_CAPACITY)
    assert feed(run, CapacityFound(SLOTS), LeadLost()) == [Claim(), HandOver()]


def test_a_claim_that_cannot_be_written_is_a_restart_that_failed() -> None:
    run = in_phase(MachinePhase.CLAIMING)
    assert feed(run, ClaimFailed("No space left on device")) == []
    assert feed(run, Tick(), CapacityFound(), now=11.0) == [FindCapacity(), Claim()]


def test_a_lost_standby_is_replaced_under_a_new_claim_and_the_attempt_goes_on() -> None:
    run = executing()
    assert feed(run, StandbyLost()) == [Claim()]
    assert feed(run, Claimed()) == [AppointStandby()]
    assert run.phase is MachinePhase.EXECUTING
    assert feed(run, AttemptFinished(FINISHED)) == [End(FINISHED)]


def test_a_standby_that_has_begun_to_lead_gets_the_run() -> None:
    assert feed(executing(), StandbyLost(), LeadLost()) == [Claim(), HandOver()]


def test_who_cannot_see_the_folder_after_a_lost_standby_does_not_lead_on() -> None:
    assert feed(executing(), StandbyLost(), ClaimFailed("stale handle")) == [Claim(), HandOver()]


def test_a_standby_that_is_lost_twice_is_one_claim() -> None:
    assert feed(executing(), StandbyLost(), StandbyLost()) == [Claim()]


def test_an_attempt_that_breaks_during_a_claim_for_a_standby_needs_no_second_claim() -> None:
    run = executing()
    assert feed(run, StandbyLost(), DIES, CapacityFound(SLOTS)) == [Claim(), FindCapacity()]
    assert feed(run, Claimed()) == [AppointStandby(), Heal(SLOTS)]
    assert feed(run, Healed(), ResumePointFound(None))[-2] == AppointStandby()


def test_a_standby_lost_before_the_claim_of_a_restart_does_not_stand_in_for_it() -> None:
    """One was appointed in between: it may lead in the term after that claim."""
    run = in_phase(MachinePhase.FINDING_CAPACITY)
    assert feed(run, StandbyLost(), Claimed()) == [Claim(), AppointStandby()]
    assert feed(run, CapacityFound()) == [Claim()]


def test_a_standby_that_is_lost_while_the_run_heals_is_replaced() -> None:
    run = in_phase(MachinePhase.HEALING)
    assert feed(run, StandbyLost(), Claimed()) == [Claim(), AppointStandby()]
    assert run.phase is MachinePhase.HEALING


def test_a_leader_lost_while_healing_leaves_the_rest_to_the_other_one() -> None:
    run = in_phase(MachinePhase.HEALING)
    assert feed(run, LeadLost(), Healed(), ResumePointFound(POINT)) == [HandOver()]


def test_two_agents_that_claim_the_same_term_do_not_both_execute_the_run() -> None:
    """Every interleaving of the leader's restart with a follower that takes the run over."""
    for first in ("leader", "follower"):
        leader, follower = in_phase(MachinePhase.FINDING_CAPACITY), RunMachine(RestartPolicy(3, 1))
        assert feed(leader, CapacityFound()) == [Claim()]
        won = Claimed() if first == "leader" else LeadLost()
        told = feed(leader, won)
        if first == "follower":
            assert told == [HandOver()]
            assert feed(follower, TakenOver()) == [AppointStandby(), FindCapacity()]
        else:
            assert told == [AppointStandby(), Heal(())]


# --- a run that is taken over ---


def test_a_run_that_was_taken_over_is_executed_again_as_one_restart_under_a_claim_of_its_own() -> None:
    run = RunMachine(RestartPolicy(3, num_restarts=1))
    assert feed(run, TakenOver()) == [AppointStandby(), FindCapacity()], "it may wait long for capacity"
    assert feed(run, CapacityFound(SLOTS), Claimed()) == [Claim(), AppointStandby(), Heal(SLOTS)]
    _, resume = feed(run, Healed(), ResumePointFound(POINT))[-2:]
    note = "the agent that led the run was lost; resumed from step 8 (restart 2 of 3)"
    assert resume == Resume(2, POINT, note)


def test_a_run_that_was_being_stopped_is_stopped_by_the_next_leader() -> None:
    run = RunMachine(RestartPolicy(3))
    assert feed(run, TakenOver(was_stopping=True)) == [End(Finish("stopped", None, renew=True, dead=()))]


def test_a_run_that_has_used_up_its_restarts_is_lost_with_its_leader() -> None:
    run = RunMachine(RestartPolicy(1, num_restarts=1))
    note, end = feed(run, TakenOver())
    assert note == Note("not executed again: all 1 restarts are used up.")
    assert isinstance(end, End)
    assert end.finish.state == "lost"


# --- Stop ---


def test_a_stop_climbs_the_ladder_of_the_attempt_and_is_the_end_of_all_restarts() -> None:
    run = executing()
    assert feed(run, StopAsked(), StopAsked()) == [StopAttempt(), StopAttempt()]
    assert feed(run, DIES) == [End(DIED)], "ranks that were killed by the Stop are no reason for a restart"


def test_a_stop_between_two_attempts_ends_the_run_at_once(between: RunMachine) -> None:
    assert feed(between, StopAsked()) == [End(Finish("stopped", None, renew=False, dead=()))]
    assert between.wake_at is None
    late: list[Event] = [CapacityFound(SLOTS), Claimed(), Healed(), ResumePointFound(POINT), NoCapacity("full"), Tick()]
    assert feed(between, *late, now=999) == [], "what was under way comes to nothing"


def test_a_run_is_stopped_once() -> None:
    run = in_phase(MachinePhase.WAITING_FOR_CAPACITY)
    assert len(feed(run, StopAsked(), StopAsked(), StopAsked())) == 1


# --- the time of a run ---


def test_a_run_that_has_used_its_time_is_told_so_once() -> None:
    run = executing(deadline=60.0)
    assert run.wake_at == 60.0
    assert feed(run, Tick(), now=59) == []
    assert feed(run, Tick(), Tick(), now=60) == [TimeOut()]
    assert feed(run, StopAsked(), now=60) == [StopAttempt()]


def test_the_time_runs_also_while_it_waits_for_capacity() -> None:
    run = executing(deadline=10.5)
    feed(run, DIES, NoCapacity("full"))
    assert run.wake_at == 10.5
    assert feed(run, Tick(), now=10.5) == [TimeOut()]
    assert feed(run, StopAsked(), now=10.5) == [End(Finish("stopped", None, renew=False, dead=()))]


# --- the agent is told to end ---


@pytest.mark.parametrize("phase", [MachinePhase.EXECUTING, *BETWEEN], ids=lambda phase: phase.value)
def test_an_agent_that_is_told_to_end_leaves_the_run_to_one_that_stands_by(phase: MachinePhase) -> None:
    run = in_phase(phase)
    assert feed(run, LeaveAsked()) == [HandOver(to_standby=True)]
    assert feed(run, DIES, StopAsked()) == [], "its end here is not the end of the run"


def test_a_run_without_restarts_goes_on_nowhere_else() -> None:
    run = executing(max_restarts=0)
    assert feed(run, LeaveAsked()) == []
    assert feed(run, DIES) == [End(DIED)]


# --- the end is told by one agent only ---


def test_the_end_is_not_told_without_a_claim_once_another_agent_may_lead() -> None:
    run = executing()
    assert feed(run, AttemptFinished(FINISHED), leads_until=9.0) == [Claim(to_end=True)]
    assert feed(run, Claimed(), leads_until=9.0) == [End(FINISHED)]


@pytest.mark.parametrize("answer", [LeadLost(), ClaimFailed("stale handle")])
def test_an_end_that_another_agent_may_tell_is_not_told_here(answer: Event) -> None:
    run = executing()
    assert feed(run, AttemptFinished(FINISHED), answer, leads_until=10.0) == [Claim(to_end=True), HandOver()]


def test_an_end_waits_for_the_claim_that_is_under_way() -> None:
    run = executing()
    feed(run, StandbyLost())
    assert feed(run, AttemptFinished(FINISHED), leads_until=9.0) == []
    assert feed(run, StopAsked()) == []
    assert feed(run, Claimed()) == [End(FINISHED)]


# --- all interleavings ---


def _answers(instruction: Instruction) -> list[Event]:
    """What may come back of an instruction."""
    match instruction:
        case FindCapacity():
            return [CapacityFound(SLOTS), CapacityFound(), NoCapacity("full"), LeadLost(), RestartFailed("broken")]
        case Claim():
            return [Claimed(), Claimed(), Claimed(), LeadLost(), ClaimFailed("stale handle")]
        case Heal():
            return [Healed(), Healed(), NoCapacity("taken"), RestartFailed("broken")]
        case FindResumePoint():
            return [ResumePointFound(POINT), ResumePointFound(None), RestartFailed("broken")]
        case Resume():
            return [
                DIES,
                AttemptFinished(DIED, AttemptFailure("error", 0, "ValueError", 14)),
                AttemptFinished(FINISHED),
            ]
    return []


def _story(dice: random.Random) -> Iterator[tuple[RunMachine, Event, list[Instruction]]]:
    """A run whose instructions are answered in any order, late or never, with anything happening in between."""
    run = RunMachine(RestartPolicy(dice.randint(0, 4)), deadline=dice.choice([None, 30.0]))
    now, under_way = 0.0, [DIES, AttemptFinished(FINISHED)][: dice.randint(1, 2)]
    first: Event = dice.choice([AttemptStarted(), TakenOver()])
    pending: list[Event] = [dice.choice(under_way)] if isinstance(first, AttemptStarted) else []
    event = first
    num_left = 200
    while num_left := num_left - 1:
        out = run.handle(event, now, dice.choice([now - 1, now + 1]))
        yield run, event, out
        num_left = min(num_left, 10) if run.is_over else num_left
        pending += [dice.choice(answers) for instruction in out if (answers := _answers(instruction))]
        now += dice.choice([0.0, 0.1, 5.0])
        rare: list[Event] = [Tick(), WorkerJoined(), StandbyLost(), GO_BACK, StopAsked(), LeaveAsked()]
        if pending and dice.random() < 0.7:
            event = pending.pop(dice.randrange(len(pending)))
        else:
            event = dice.choice(rare[: 4 if dice.random() < 0.95 else 6])


@pytest.mark.parametrize("seeds", [range(at, at + 100) for at in range(0, 500, 100)], ids=str)
def test_whatever_happens_a_run_ends_once_claims_before_it_heals_and_counts_its_restarts(seeds: range) -> None:
    for seed in seeds:
        _check_story(random.Random(seed))


def _check_story(dice: random.Random) -> None:
    last: list[Instruction] = []
    claimed = is_searching = is_claiming = False
    num_attempts = 0
    for run, event, out in _story(dice):
        is_claiming &= not isinstance(event, Claimed | ClaimFailed)
        is_searching &= not isinstance(event, CapacityFound | NoCapacity | Healed | ResumePointFound | RestartFailed)
        claimed |= isinstance(event, Claimed)
        assert not (last and out), "nothing follows the end"
        for instruction in out:
            if isinstance(instruction, FindCapacity | Heal | FindResumePoint):
                assert not is_searching, "one at a time"
                is_searching = True
            if isinstance(instruction, Claim):
                assert not is_claiming, "one at a time"
                is_claiming = True
            if isinstance(instruction, Heal):
                assert claimed, "no rank is started without a claim"
            if isinstance(instruction, Resume):
                num_attempts += 1
                assert instruction.number <= run.policy.max_restarts + run.policy.num_rollbacks
                claimed = False
        last += [instruction for instruction in out if isinstance(instruction, End | HandOver)]
        assert run.is_over == bool(last)
        assert num_attempts <= run.policy.max_restarts + run.policy.num_rollbacks
        if run.phase in (MachinePhase.WAITING_FOR_CAPACITY, MachinePhase.BACKING_OFF):
            assert run.wake_at is not None, "nobody else wakes it"
    assert len(last) <= 1
