"""The rule that calls a rank late, by values: hours of simulated training in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest

from jupyter_llmcloud.core.run.hang import GroupState, HangReport, HangRule, Sample

TICK_S = 0.5
FOREVER = float("inf")


@dataclass(frozen=True)
class Work:
    """What a rank does before its next collective."""

    phase: str
    seconds: float
    working: bool = True
    place: str = "In [4], line 12"


Step = list[list[Work]]  # by rank


def group(ranks: int, begun: int, finished: int) -> dict[str, GroupState]:
    return {"world/gloo": GroupState(tuple(range(ranks)), begun, finished)}


def sample(ranks: int, done: int, work: Work, since: float) -> Sample:
    still = 0.0 if work.working else since
    return Sample(work.phase, "", group(ranks, done, done), done, work.place, "f()", still, work.working)


def waiting(ranks: int, done: int, since: float, op: str = "all_reduce", place: str = "In [4], line 15") -> Sample:
    return Sample("collective", op, group(ranks, done + 1, done), done, place, "", since)


class Training:
    """Ranks that work, then meet in a collective, over and over; the rule hears what their side threads would say."""

    def __init__(self, size: int, steps: Iterable[Step], floor_s: float = 10.0) -> None:
        self.size = size
        self.rule = HangRule(tuple(range(size)), size, 0.0, floor_s)
        self.silent: dict[int, float] = {}  # from when on a rank says nothing
        self.state = "S"
        self.reports: list[tuple[float, HangReport]] = []
        self.now = 0.0
        self._steps = enumerate(iter(steps))
        self._left = 0.0
        self._next()

    def _next(self) -> None:
        self._began = self._left
        self._number, self._step = next(self._steps, (0, [[Work("compute", FOREVER, False)]] * self.size))
        self._left = self._began + max(sum(work.seconds for work in row) for row in self._step)

    def run(self, seconds: float) -> list[HangReport]:
        """Go on for so long; the reports of that time."""
        before = len(self.reports)
        end = self.now + seconds
        while self.now < end:
            self.now += TICK_S
            while self.now >= self._left:
                self._next()
            for rank in range(self.size):
                if self.now < self.silent.get(rank, FOREVER):
                    self.rule.heard(rank, self._seen(rank), self.now)
            for rank in self.rule.silent(self.now):
                self.rule.looked(rank, self.state, 1.0)
            if report := self.rule.check(self.now):
                self.reports.append((self.now, report))
        return [report for _, report in self.reports[before:]]

    def _seen(self, rank: int) -> Sample:
        at = self._began
        for work in self._step[rank]:
            if self.now < at + work.seconds:
                return sample(self.size, self._number, work, self.now - at)
            at += work.seconds
        return waiting(self.size, self._number, self.now - at)


def ordinary(size: int, rng: random.Random) -> Step:
    return [[Work("data", rng.uniform(0.01, 0.1)), Work("compute", rng.uniform(0.2, 0.5))] for _ in range(size)]


def healthy(size: int, seed: int) -> Iterator[Step]:
    """A training with everything slow that belongs to one: on all ranks alike, and on one while the others wait."""
    rng = random.Random(seed)
    number = 0
    while True:
        number += 1
        step = ordinary(size, rng)
        someone = rng.randrange(size)
        if number % 200 == 0:
            step = [[*row, Work("evaluation", rng.uniform(60, 90))] for row in step]
        if number % 330 == 0:
            step = [[*row, Work("checkpoint", rng.uniform(5, 70), working=False)] for row in step]
        if number % 270 == 0:
            step[0].append(Work("checkpoint", rng.uniform(5, 50)))
        if number % 410 == 0:
            step[0].append(Work("evaluation", rng.uniform(20, 55)))
        if number % 90 == 0:
            step[someone].insert(0, Work("data", rng.uniform(3, 30)))
        if number % 37 == 0:
            step[someone].append(Work("compute", rng.uniform(1, 8)))
        yield step


@pytest.mark.parametrize("seed", range(5))
def test_two_healthy_hours_raise_no_alarm(seed: int) -> None:
    assert Training(4, healthy(4, seed)).run(7200) == []


@pytest.mark.parametrize("phase", ["data", "checkpoint", "evaluation", "compute", "unknown"])
def test_what_all_ranks_do_is_never_a_hang(phase: str) -> None:
    step = [[Work(phase, 3600, working=False)] for _ in range(4)]
    assert Training(4, iter([step])).run(3000) == []


def after_a_while(fault: Callable[[Step], Step]) -> Training:
    """Fifty ordinary steps, then a fault in every step."""
    rng = random.Random(0)
    steps = [ordinary(4, rng) for _ in range(50)]
    training = Training(4, [*steps, fault(ordinary(4, rng))])
    assert training.run(15) == []
    return training


def stuck(rank: int, phase: str = "compute", seconds: float = FOREVER, working: bool = False) -> Callable[[Step], Step]:
    def fault(step: Step) -> Step:
        step[rank] = [Work(phase, seconds, working)]
        return step

    return fault


def test_a_rank_that_sleeps_is_named_with_its_line_and_what_the_others_wait_in() -> None:
    training = after_a_while(stuck(1))
    (report,) = training.run(60)
    assert report.late == (1,)
    assert report.waiting == (0, 2, 3)
    assert "rank 1 is late: at In [4], line 12 (f())" in report.text
    assert "ranks 0,2-3 wait in all_reduce #51 at In [4], line 15" in report.text


@pytest.mark.parametrize("phase", ["data", "checkpoint", "evaluation", "compute", "unknown"])
def test_a_rank_that_stands_still_is_reported_within_the_floor_in_any_phase(phase: str) -> None:
    training = after_a_while(stuck(2, phase))
    training.run(60)
    began = training._began
    ((when, report),) = training.reports
    assert report.late == (2,)
    assert when - began <= 10.0 + 2 * TICK_S + 0.6  # the others enter the collective within 0.6 s


def test_several_late_ranks_are_named_together() -> None:
    training = after_a_while(lambda step: stuck(3)(stuck(1)(step)))
    (report,) = training.run(60)
    assert report.late == (1, 3)
    assert "ranks 1,3 are late" in report.text


def test_a_rank_that_visibly_works_on_a_checkpoint_has_a_minute() -> None:
    assert after_a_while(stuck(0, "checkpoint", 55, working=True)).run(56) == []


def test_a_rank_that_works_on_a_checkpoint_without_end_is_reported_after_that() -> None:
    (report,) = after_a_while(stuck(0, "checkpoint", working=True)).run(120)
    assert report.late == (0,)


def test_how_long_the_others_usually_wait_for_one_rank_there_becomes_normal() -> None:
    alone = Work("compute", 30, working=True)
    training = Training(2, ([[alone], [Work("compute", 0.1)]] for _ in range(100)))
    assert [report.recovered for report in training.run(70)] == [False, True]
    assert training.run(600) == []


def test_what_is_normal_in_one_phase_is_not_in_another() -> None:
    steps = [[[Work("data", 40), Work("compute", 0.2)], [Work("compute", 0.2)]] for _ in range(10)]
    training = Training(2, [*steps, [[Work("compute", FOREVER, False)], [Work("compute", 0.2)]]])
    assert training.run(402) == []
    ((when, report),) = [training.run(30), training.reports][1]
    assert report.late == (0,)
    assert when - training._began < 12


def test_a_rank_that_goes_from_phase_to_phase_without_arriving_is_late_too() -> None:
    wandering = [Work(phase, 3) for _ in range(100) for phase in ("data", "compute")]
    training = Training(2, [[wandering, [Work("compute", 0.1)]]])
    ((when, report),) = [training.run(90), training.reports][1]
    assert report.late == (0,)
    assert 60 <= when <= 62


def test_after_a_recovery_the_next_hang_is_reported_again() -> None:
    rng = random.Random(1)
    slow = stuck(1, seconds=30)
    training = Training(4, [slow(ordinary(4, rng)), *(ordinary(4, rng) for _ in range(20)), slow(ordinary(4, rng))])
    kinds = [(report.late, report.recovered) for report in training.run(90)]
    assert kinds == [((1,), False), ((1,), True)] * 2
    assert "rank 1 goes on after" in training.reports[1][1].text


def test_waiting_for_a_rank_that_stood_still_does_not_become_normal() -> None:
    rng = random.Random(1)
    steps = [step for _ in range(10) for step in (stuck(1, seconds=30)(ordinary(4, rng)), ordinary(4, rng))]
    reports = Training(4, steps).run(300)
    assert sum(not report.recovered for report in reports) == 10


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("T", "is stopped (SIGSTOP"),
        ("S", "sleeps in native code"),
        ("R", "busy in native code"),
        ("D", "waits for a disk"),
    ],
)
def test_a_silent_rank_is_described_by_the_state_of_its_process(state: str, words: str) -> None:
    training = after_a_while(stuck(1, working=True))
    training.silent, training.state = {1: training._began}, state
    (report,) = training.run(30)
    assert report.late == (1,)
    assert words in report.text
    assert training.reports[0][0] <= training._began + 10 + 2 * TICK_S + 0.6


def test_a_stopped_rank_is_late_though_nobody_waits_for_it() -> None:
    training = Training(2, [[[Work("compute", 3600)], [Work("compute", 3600)]]])
    training.run(5)
    training.silent, training.state = {0: 5.0}, "T"
    (report,) = training.run(30)
    assert report.late == (0,)
    assert "is stopped (SIGSTOP" in report.text


@pytest.mark.parametrize("state", ["R", "D", "S"])
def test_native_code_on_all_ranks_alike_is_no_hang(state: str) -> None:
    training = Training(2, [[[Work("compute", 3600)], [Work("compute", 3600)]]])
    training.silent, training.state = {0: 5.0, 1: 5.0}, state
    assert training.run(60) == []


# --- ranks that will never come ---


def tell(rule: HangRule, samples: dict[int, Sample], seconds: int = 15) -> list[HangReport]:
    """Ranks that say the same for some time, while they stand still."""
    reports = []
    for second in range(seconds):
        for rank, said in samples.items():
            rule.heard(rank, Sample(**{**said.__dict__, "still_s": float(second)}), float(second))
        if report := rule.check(float(second)):
            reports.append(report)
    return reports


def test_a_rank_that_skipped_a_collective_and_finished_the_cell_is_late() -> None:
    rule = HangRule((0, 1), 2, 0.0)
    rule.ended(1, group(2, 4, 4))
    (report,) = tell(rule, {0: waiting(2, 4, 0)})
    assert report.late == (1,)
    assert "rank 1 is late: it has reached the end of the cell" in report.text
    assert "model.join()" not in report.text


def test_a_rank_that_ran_out_of_batches_is_told_of_ways_to_train_on() -> None:
    rule = HangRule((0, 1), 2, 0.0)
    rule.ended(1, group(2, 4, 4))
    (report,) = tell(rule, {0: waiting(2, 4, 0, "the gradient all_reduce of backward")})
    assert report.text.endswith("`with model.join():` of DistributedDataParallel, or give each rank as many.")


def test_a_rank_that_finished_after_its_last_collective_is_not_to_blame() -> None:
    rule = HangRule((0, 1, 2), 3, 0.0)
    rule.ended(2, group(3, 5, 5))
    (report,) = tell(rule, {0: waiting(3, 4, 0), 1: sample(3, 4, Work("compute", 1, False), 0)})
    assert report.late == (1,)


def test_a_rank_outside_the_cell_is_late_for_a_collective_of_the_world() -> None:
    rule = HangRule((0,), 2, 0.0)
    (report,) = tell(rule, {0: waiting(2, 0, 0, "barrier")})
    assert report.late == (1,)
    assert "takes no part in this cell" in report.text


def test_different_collectives_under_one_number_are_a_deadlock() -> None:
    (report,) = tell(HangRule((0, 1), 2, 0.0), {0: waiting(2, 4, 0), 1: waiting(2, 4, 0, "broadcast")})
    assert report.late == ()
    assert "rank 0 waits in all_reduce #5" in report.text and "rank 1 waits in broadcast #5" in report.text


def test_everybody_in_the_same_slow_collective_is_no_hang() -> None:
    assert tell(HangRule((0, 1), 2, 0.0), {0: waiting(2, 4, 0), 1: waiting(2, 4, 0)}, 100) == []


def test_two_ranks_that_both_receive_are_a_deadlock() -> None:
    receiving = Sample("collective", "recv", group(2, 3, 3), place="In [1], line 2")
    (report,) = tell(HangRule((0, 1), 2, 0.0), {0: receiving, 1: receiving})
    assert "ranks 0-1 wait in recv" in report.text


def test_a_chain_of_waits_leads_to_the_rank_at_its_end() -> None:
    left, right = (0, 1), (1, 2)

    def of_groups(left_begun: int, right_begun: int) -> dict[str, GroupState]:
        return {"a/gloo": GroupState(left, left_begun, 0), "b/gloo": GroupState(right, right_begun, 0)}

    samples = {
        0: Sample("collective", "barrier", {"a/gloo": GroupState(left, 1, 0)}, place="In [1], line 1"),
        1: Sample("collective", "all_reduce", of_groups(0, 1) | {"a/gloo": GroupState(left, 0, 0)}),
        2: Sample("compute", "", {"b/gloo": GroupState(right, 0, 0)}, place="In [1], line 9"),
    }
    (report,) = tell(HangRule((0, 1, 2), 3, 0.0), samples)
    assert report.late == (2,)
    assert report.waiting == (0, 1)


def test_a_late_rank_that_comes_to_another_operation_than_the_others_wait_in_is_told_as_a_deadlock() -> None:
    rule, told = HangRule((0, 1), 2, 0.0), []
    for now in map(float, range(60)):
        late = Work("compute", FOREVER, False)
        other = sample(2, 0, late, now) if now < 15 else waiting(2, 0, now - 15, "broadcast", "In [4], line 20")
        rule.heard(0, waiting(2, 0, now), now)
        rule.heard(1, other, now)
        if (report := rule.check(now)) is not None:
            told.append(report)
    assert [report.late for report in told] == [(1,), ()]
    assert "rank 1 waits in broadcast #1 at In [4], line 20" in told[1].text and told[1].waiting == (0, 1)
