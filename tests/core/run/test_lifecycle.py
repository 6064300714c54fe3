"""The rules that end a run, by values: events in, instructions out, time as an argument."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from jupyter_llmcloud.core.run.lifecycle import (
    AskStep,
    Event,
    Finish,
    GoOnWithout,
    Instruction,
    InterruptRanks,
    KillRanks,
    Ladder,
    RankDied,
    RankEnded,
    ReleaseRanks,
    Rung,
    RunLifecycle,
    SaveAsked,
    SaveAtStep,
    StepReported,
    StopAtStep,
    StopPressed,
)
from jupyter_llmcloud.core.tick import Tick

LADDER = Ladder()


def two() -> RunLifecycle:
    return RunLifecycle((0, 1))


def feed(run: RunLifecycle, *events: Event, now: float = 10.0) -> list[Instruction]:
    """The instructions of several events at one time."""
    return [out for event in events for out in run.handle(event, now)]


def failed(rank: int, text: str = "no", **more: bool) -> RankEnded:
    return RankEnded(rank, "ValueError", text, **more)


def interrupted(rank: int, **more: bool) -> RankEnded:
    return RankEnded(rank, "KeyboardInterrupt", "", interrupted=True, **more)


# --- how runs end ---


def test_a_run_is_finished_when_all_its_ranks_are() -> None:
    run = two()
    assert feed(run, RankEnded(0)) == []
    assert run.running == (1,)
    assert feed(run, RankEnded(1)) == [Finish("finished", None, renew=False, dead=())]
    assert run.ended
    assert run.wake_at is None


def test_nothing_happens_after_the_end() -> None:
    run = two()
    feed(run, RankEnded(0), RankEnded(1))
    assert feed(run, StopPressed(), Tick(), RankDied(0, "late"), RankEnded(1), now=99) == []


def test_a_rank_ends_once() -> None:
    run = two()
    assert feed(run, RankEnded(0), failed(0), RankDied(0, "gone"), RankEnded(7)) == []
    assert run.state_of(0) == "done"


def test_the_same_error_everywhere_keeps_the_group() -> None:
    run = two()
    assert feed(run, failed(0), failed(1)) == [Finish("failed", 0, renew=False, dead=())]


@pytest.mark.parametrize(
    "events",
    [
        (failed(0), RankEnded(1)),
        (failed(0), failed(1, "another")),
        (RankEnded(0), RankEnded(1, in_group=False)),
        (failed(0), failed(1, in_group=False)),
    ],
    ids=["one failed alone", "they failed differently", "one left its group", "one is out of its group"],
)
def test_the_group_is_renewed_when_ranks_may_be_out_of_step(events: tuple[Event, ...]) -> None:
    [finish] = feed(two(), *events)
    assert isinstance(finish, Finish)
    assert finish.renew


# --- one rank fails ---


def test_peers_of_a_failed_rank_are_released_soon() -> None:
    run = two()
    assert feed(run, failed(1)) == []
    assert run.wake_at == pytest.approx(10 + LADDER.failure_release_s)
    assert feed(run, Tick(), now=10 + LADDER.failure_release_s - 0.01) == []
    assert feed(run, Tick(), now=10 + LADDER.failure_release_s) == [InterruptRanks((0,)), ReleaseRanks((0, 1))]
    assert feed(run, Tick(), now=10 + LADDER.kill_s) == [KillRanks((0,))]
    assert feed(run, RankDied(0, "killed"), now=17)[-1] == Finish("failed", 1, renew=True, dead=(0,))


def test_peers_of_a_dead_rank_are_released_at_once() -> None:
    assert feed(two(), RankDied(1, "SIGKILL")) == [ReleaseRanks((0,))]


@pytest.mark.parametrize("own_first", [True, False])
def test_the_culprit_is_the_rank_with_an_error_of_its_own(own_first: bool) -> None:
    events = [failed(2, "own"), RankEnded(0, "RuntimeError", "connection closed", collateral=True)]
    run = RunLifecycle((0, 1, 2))
    out = feed(run, *(events if own_first else events[::-1]), RankEnded(1))
    assert out[-1].culprit == 2  # type: ignore[union-attr]


def test_a_dead_rank_is_the_culprit_before_an_echo() -> None:
    run = two()
    out = feed(run, RankEnded(0, "RuntimeError", "closed", collateral=True), RankDied(1, "SIGSEGV"))
    assert out[-1] == Finish("failed", 1, renew=True, dead=(1,))


def test_a_rank_that_we_have_killed_is_not_the_culprit() -> None:
    run = two()
    feed(run, RankEnded(0, "RuntimeError", "closed", collateral=True), now=10)
    feed(run, Tick(), now=10 + LADDER.kill_s)
    assert feed(run, RankDied(1, "SIGKILL"))[-1] == Finish("failed", 0, renew=True, dead=(1,))


def test_of_two_own_errors_the_first_is_the_culprit() -> None:
    assert feed(two(), failed(1, "first"), failed(0, "second"))[-1].culprit == 1  # type: ignore[union-attr]


def test_an_interrupt_of_a_peer_is_no_failure_of_its_own() -> None:
    run = two()
    feed(run, failed(1))
    assert feed(run, interrupted(0))[-1].culprit == 1  # type: ignore[union-attr]
    assert run.state_of(0) == "interrupted"


def test_an_interrupt_that_nobody_asked_for_is_an_error() -> None:
    out = feed(two(), interrupted(0), RankEnded(1))
    assert out[-1].state == "failed"  # type: ignore[union-attr]


# --- the ladder of a Stop ---


def test_without_steps_all_ranks_are_interrupted_at_once() -> None:
    run = two()
    assert feed(run, StopPressed()) == [AskStep((0, 1))]
    assert feed(run, StepReported(0, 0)) == []
    assert feed(run, StepReported(1, 0), now=10.1) == [StopAtStep((0, 1), -1), InterruptRanks((0, 1))]
    assert run.wake_at == pytest.approx(10.1 + LADDER.release_s)
    assert feed(run, Tick(), now=10.1 + LADDER.release_s) == [InterruptRanks((0, 1)), ReleaseRanks((0, 1))]
    assert run.wake_at == pytest.approx(10 + LADDER.kill_s)
    assert feed(run, interrupted(0), now=12) == []
    assert feed(run, Tick(), now=10 + LADDER.kill_s) == [KillRanks((1,))]
    out = feed(run, RankDied(1, "killed"), now=17)
    assert out[-1] == Finish("stopped", 1, renew=True, dead=(1,))


def test_with_steps_all_ranks_stop_one_after_the_largest() -> None:
    run = two()
    feed(run, StopPressed())
    assert feed(run, StepReported(1, 7), StepReported(0, 6)) == [StopAtStep((0, 1), 8)]
    assert feed(run, interrupted(0), interrupted(1)) == [Finish("stopped", None, renew=False, dead=())]


def test_ranks_that_do_not_come_to_their_step_are_interrupted() -> None:
    run = two()
    feed(run, StopPressed(), StepReported(1, 7), StepReported(0, 6))
    assert run.wake_at == pytest.approx(10 + LADDER.interrupt_s)
    assert feed(run, Tick(), now=10 + LADDER.interrupt_s) == [InterruptRanks((0, 1))]
    out = feed(run, interrupted(0), interrupted(1), now=12)
    assert out[-1] == Finish("stopped", None, renew=True, dead=())


def test_a_rank_that_does_not_answer_is_interrupted_in_time() -> None:
    run = two()
    feed(run, StopPressed(), StepReported(0, 3))
    assert feed(run, Tick(), now=10 + LADDER.interrupt_s) == [InterruptRanks((0, 1))]


def test_only_ranks_that_still_run_are_asked() -> None:
    run = two()
    feed(run, RankEnded(0))
    assert feed(run, StopPressed()) == [AskStep((1,))]
    assert feed(run, StepReported(1, 4)) == [StopAtStep((1,), 5)]


def test_every_further_press_goes_to_the_next_rung() -> None:
    run = two()
    assert feed(run, StopPressed(), now=10) == [AskStep((0, 1))]
    assert feed(run, StopPressed(), now=11) == [InterruptRanks((0, 1))]
    assert feed(run, StopPressed(), now=12) == [InterruptRanks((0, 1)), ReleaseRanks((0, 1))]
    assert feed(run, StopPressed(), now=13) == [KillRanks((0, 1))]
    assert feed(run, StopPressed(), now=14) == [KillRanks((0, 1))]
    assert run.rung == Rung.KILL


def test_a_double_click_is_one_press_and_impatience_is_not() -> None:
    """A second click within a moment took the ranks' chance to stop after a whole step."""
    run = two()
    assert feed(run, StopPressed(), now=10) == [AskStep((0, 1))]
    assert feed(run, StopPressed(), now=10.2) == [] and run.rung == Rung.CONSENSUS
    assert feed(run, StepReported(0, 3), StepReported(1, 3), now=10.3) == [StopAtStep((0, 1), 4)]
    assert feed(run, StopPressed(), now=10.6) == [InterruptRanks((0, 1))]
    assert feed(run, StopPressed(), now=10.8) == [] and run.rung == Rung.INTERRUPT


def test_a_late_tick_gives_the_ranks_their_time_after_the_interrupt_all_the_same() -> None:
    run = two()
    feed(run, StopPressed())
    assert feed(run, Tick(), now=100) == [InterruptRanks((0, 1))]
    assert run.wake_at == pytest.approx(100 + LADDER.release_s)


def test_the_ladder_ends_within_the_worst_case() -> None:
    run = two()
    feed(run, StopPressed())
    now = 10.0
    while run.rung != Rung.KILL:
        assert run.wake_at is not None
        now = run.wake_at
        feed(run, Tick(), now=now)
    assert now - 10 < 8


def test_a_stop_that_comes_too_late_says_stopped_all_the_same() -> None:
    run = two()
    feed(run, StopPressed(), RankEnded(0))
    assert feed(run, RankEnded(1)) == [Finish("stopped", None, renew=False, dead=())]


def test_an_error_of_its_own_before_the_interrupt_is_a_failure() -> None:
    run = two()
    feed(run, StopPressed(), failed(0))
    assert feed(run, interrupted(1))[-1].state == "failed"  # type: ignore[union-attr]


def test_an_echo_of_the_release_does_not_make_a_stop_a_failure() -> None:
    run = two()
    for now in (10, 11, 12):
        feed(run, StopPressed(), now=now)
    out = feed(run, interrupted(0), RankEnded(1, "RuntimeError", "closed", collateral=True))
    assert out[-1].state == "stopped"  # type: ignore[union-attr]
    assert out[-1].renew  # type: ignore[union-attr]


def test_a_stop_after_a_failure_still_ends_the_peers() -> None:
    run = two()
    feed(run, failed(0))
    feed(run, StopPressed(), now=10.1)
    now = 10.1
    told: list[Instruction] = []
    while run.wake_at is not None and now < 100:
        now = max(now, run.wake_at)
        told += feed(run, Tick(), now=now)
    assert KillRanks((1,)) in told
    assert now - 10 < 8


def test_a_rank_that_has_not_finished_its_first_step_waits_for_the_others() -> None:
    run = two()
    feed(run, StopPressed())
    assert feed(run, StepReported(0, 0), StepReported(1, 1)) == [StopAtStep((0, 1), 2)]


# --- the step at which all stop: every interleaving ---


@dataclass
class Trainee:
    """A rank as training/steps.py makes it: counts, pauses when asked, raises at its limit. `peers`: lock step."""

    rank: int
    count: int = 0
    asked: bool = False
    limit: int | None = None
    stopped_at: int | None = None
    asked_count: int = 0
    inbox: list[Instruction] = field(default_factory=list)

    def can_step(self, others: list[Trainee], lock_step: bool) -> bool:
        """Whether its main thread could finish one more step now."""
        if self.stopped_at is not None or (self.asked and self.count > self.asked_count):
            return False
        return not lock_step or all(other.count >= self.count for other in others)

    def step(self) -> None:
        self.count += 1
        self._raise_at_limit()

    def answer(self) -> int:
        self.asked, self.asked_count = True, self.count
        return self.count

    def told(self, step: int) -> None:
        self.asked, self.limit = False, step
        if self.count > self.asked_count:  # it waits inside the boundary of this very step
            self._raise_at_limit()

    def _raise_at_limit(self) -> None:
        # A rank that was asked waits in the boundary before it looks at its limit.
        if not self.asked and self.limit is not None and self.count >= self.limit:
            self.stopped_at = self.count


@pytest.mark.parametrize("lock_step", [True, False], ids=["with collectives", "without"])
def test_all_ranks_stop_after_the_same_step_however_messages_and_steps_interleave(lock_step: bool) -> None:
    stops = [_stops(random.Random(seed), lock_step) for seed in range(300)]
    assert [len(steps) for steps in stops] == [1] * 300
    assert not any(None in steps for steps in stops)


def _stops(rng: random.Random, lock_step: bool) -> set[int | None]:
    """The steps after which the ranks of a random world stopped."""
    size = rng.randint(2, 5)
    start = rng.randint(0 if lock_step else 1, 50)
    trainees = [Trainee(rank, start + (0 if lock_step else rng.randint(0, 9))) for rank in range(size)]
    run = RunLifecycle(tuple(range(size)))
    answers: list[StepReported] = []
    if lock_step:
        rng.choice(trainees).step()  # one is ahead, perhaps by the very first step
    _deliver(run.handle(StopPressed(), 0.0), trainees)
    for _ in range(10_000):
        if all(item.stopped_at is not None for item in trainees):
            break
        _one_thing_happens(rng, run, trainees, answers, lock_step)
    return {item.stopped_at for item in trainees}


def _deliver(instructions: list[Instruction], trainees: list[Trainee]) -> None:
    for instruction in instructions:
        for rank in instruction.ranks:  # type: ignore[union-attr]
            trainees[rank].inbox.append(instruction)


def _one_thing_happens(
    rng: random.Random, run: RunLifecycle, trainees: list[Trainee], answers: list[StepReported], lock_step: bool
) -> None:
    """A rank finishes a step, a rank reads its next message, or the agent reads an answer."""
    item = rng.choice(trainees)
    others = [other for other in trainees if other is not item]
    match rng.randrange(3):
        case 0 if item.can_step(others, lock_step):
            item.step()
        case 1 if item.inbox:
            match item.inbox.pop(0):
                case AskStep():
                    answers.append(StepReported(item.rank, item.answer()))
                case StopAtStep(_, step):
                    item.told(step)
        case 2 if answers:
            _deliver(run.handle(answers.pop(rng.randrange(len(answers))), 0.0), trainees)


# --- a checkpoint before the end ---


def test_a_checkpoint_is_of_the_next_step_that_no_rank_has_passed_and_nobody_is_told_to_stop() -> None:
    run = two()
    assert feed(run, SaveAsked()) == [AskStep((0, 1), stops=False)]
    assert feed(run, StepReported(0, 7)) == []
    assert feed(run, StepReported(1, 8)) == [SaveAtStep((0, 1), 9)]
    assert run.wake_at is None and not run.is_ending
    assert feed(run, StopPressed()) == [AskStep((0, 1))]
    assert feed(run, StepReported(0, 9), StepReported(1, 9)) == [StopAtStep((0, 1), 10)]


@pytest.mark.parametrize("steps", [(), (5,), (0, 0)])
def test_ranks_that_do_not_step_go_on_without_a_checkpoint(steps: tuple[int, ...]) -> None:
    run = two()
    feed(run, SaveAsked(), now=10.0)
    said = [out for rank, step in enumerate(steps) for out in run.handle(StepReported(rank, step), 10.1)]
    if len(steps) < 2:
        assert run.wake_at == 10.0 + LADDER.interrupt_s
        said = run.handle(Tick(), run.wake_at)
    assert said == [SaveAtStep((0, 1), -1)]
    assert run.wake_at is None


def test_a_stop_a_failure_or_the_end_comes_before_a_checkpoint() -> None:
    for event in (StopPressed(), failed(0), RankDied(0, "gone")):
        run = two()
        feed(run, SaveAsked())
        said = feed(run, event)
        assert isinstance(said[0], SaveAtStep) and said[0].step == -1
        assert feed(run, SaveAsked())[0] == SaveAtStep(run.running, -1)
    run = two()
    feed(run, SaveAsked(), RankEnded(0))
    assert feed(run, StepReported(1, 3)) == [SaveAtStep((1,), 4)]
    assert [type(out) for out in feed(two(), SaveAsked(), RankEnded(0), RankEnded(1))][-2:] == [SaveAtStep, Finish]


# --- ranks that the others do without ---


def three_of_which_one_suffices() -> RunLifecycle:
    return RunLifecycle((0, 1, 2), dispensable=frozenset({1, 2}))


def test_a_run_goes_on_without_a_rank_that_it_can_do_without() -> None:
    run = three_of_which_one_suffices()
    assert feed(run, RankDied(1, "SIGKILL")) == [GoOnWithout(1, "SIGKILL")]
    assert not run.is_ending and run.running == (0, 2)
    assert feed(run, RankEnded(0), RankEnded(2)) == [Finish("finished", None, renew=True, dead=(1,))]


def test_a_stop_and_a_checkpoint_ask_only_the_ranks_that_are_left() -> None:
    run = three_of_which_one_suffices()
    feed(run, RankDied(1, "SIGKILL"))
    assert feed(run, SaveAsked()) == [AskStep((0, 2), stops=False)]
    assert feed(run, StepReported(0, 5), StepReported(2, 7)) == [SaveAtStep((0, 2), 8)]
    assert feed(run, StopPressed()) == [AskStep((0, 2))]
    assert feed(run, interrupted(0), interrupted(2)) == [Finish("stopped", None, renew=True, dead=(1,))]


def test_a_run_ends_with_a_rank_that_it_cannot_do_without() -> None:
    run = three_of_which_one_suffices()
    assert feed(run, RankDied(0, "SIGKILL")) == [ReleaseRanks((1, 2))]
    assert feed(run, RankDied(1, "SIGKILL")) != [GoOnWithout(1, "SIGKILL")]  # it is ending


@pytest.mark.parametrize(("is_echo", "culprit"), [(True, 1), (False, 0)])
def test_an_error_after_a_loss_is_the_ranks_own_unless_it_is_an_echo(is_echo: bool, culprit: int) -> None:
    run = three_of_which_one_suffices()
    feed(run, RankDied(1, "SIGKILL"), failed(0, collateral=is_echo))
    (finish,) = feed(run, RankEnded(2))
    assert finish == Finish("failed", culprit, renew=True, dead=(1,))


def pressed_after_a_failure(at: float) -> list[tuple[float, type]]:
    """What is done to the other rank, and when: one has failed at 10.0, Stop is pressed so much later."""
    run = two()
    feed(run, RankEnded(0, ename="ValueError"), now=10.0)
    done: list[tuple[float, type]] = []
    pressed = False
    while run.wake_at is not None and run.rung < Rung.KILL:
        is_press = not pressed and 10.0 + at <= run.wake_at
        now = 10.0 + at if is_press else run.wake_at
        pressed |= is_press
        done += [
            (round(now - 10.0, 2), type(item)) for item in feed(run, StopPressed() if is_press else Tick(), now=now)
        ]
    return done


@pytest.mark.parametrize("at", [0.1, 1.0, 6.0])
def test_a_stop_after_a_failure_makes_nothing_later(at: float) -> None:
    done = pressed_after_a_failure(at)
    released = next(when for when, what in done if what is ReleaseRanks)
    killed = next(when for when, what in done if what is KillRanks)
    assert released <= LADDER.failure_release_s and killed <= LADDER.kill_s
    assert any(what in (InterruptRanks, AskStep) and when == at for when, what in done)


@pytest.mark.parametrize("at", [0.1, 2.0])
def test_what_had_failed_before_stop_was_pressed_has_failed(at: float) -> None:
    run = two()
    feed(run, RankEnded(0, ename="ValueError"), now=10.0)
    feed(run, Tick(), now=10.0 + LADDER.failure_release_s)
    feed(run, StopPressed(), now=10.0 + LADDER.failure_release_s + at)
    (finish,) = feed(run, RankEnded(1, ename="KeyboardInterrupt", interrupted=True), now=15.0)
    assert isinstance(finish, Finish) and (finish.state, finish.culprit) == ("failed", 0)
