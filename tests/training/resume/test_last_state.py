"""What a rank holds of its last iteration: when it is taken, and when others may go on from it. By values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jupyter_llmcloud.training.checkpoint.borrower import Borrower
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain
from jupyter_llmcloud.training.resume import last_state
from jupyter_llmcloud.training.resume.last_state import LastState

WEIGHT = torch.zeros(100, 100)
ELASTIC: Any = SimpleNamespace(elastic="1:3", ranks=[0, 1, 2], plan="")


class Cell:
    """Whose state is one large tensor."""

    fails = False

    def take(self, position: Any, step: int, stager: Borrower) -> Any:
        if self.fails:
            raise NotPlain("a file")
        stager.begin({WEIGHT.untyped_storage().data_ptr()})
        return {"model": stager.copy("weight", WEIGHT)}, {"world_size": 3, "steps": step}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Seconds that pass, and that taking takes."""
    clock = SimpleNamespace(now=100.0, cost=0.0)

    def costs() -> float:
        clock.now += clock.cost / 2  # it is asked twice
        return float(clock.now)

    times = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=costs, sleep=lambda _: None)
    monkeypatch.setattr(last_state, "time", times)
    return clock


def last_of(cell: Any = None, **settings: Any) -> LastState:
    last = LastState(cell or Cell())
    last.begin(SimpleNamespace(**{**vars(ELASTIC), **settings}))  # type: ignore[arg-type]
    return last


def steps(last: LastState, clock: SimpleNamespace, seconds: float, number: int) -> int:
    """How often it was taken in so many steps of so many seconds."""
    taken = 0
    for step in range(number):
        clock.now += seconds
        last.drop()
        if last.is_due():
            last.take({}, step)
            taken += 1
    return taken


def test_it_is_taken_in_each_step_where_that_costs_next_to_nothing(clock: SimpleNamespace) -> None:
    clock.cost = 0.01
    assert steps(last_of(), clock, 2.0, 50) == 49, "the length of the first one is not known"
    last = last_of()
    assert steps(last, clock, 0.1, 5) == 1, "then it is known what it costs"
    assert not last.is_near
    assert 0 < steps(last, clock, 0.1, 1000) < 20, "and now and then looked at again"


@pytest.mark.parametrize("settings", [{"elastic": ""}, {"ranks": [0]}, {"plan": "fsdp"}])
def test_only_replicas_of_an_elastic_run_hold_it(settings: dict[str, Any], clock: SimpleNamespace) -> None:
    assert steps(last_of(**settings), clock, 2.0, 5) == 0


def test_what_cannot_be_saved_is_not_tried_again(clock: SimpleNamespace) -> None:
    cell = Cell()
    cell.fails = True
    assert steps(last_of(cell), clock, 2.0, 5) == 1


def test_those_that_are_left_get_the_whole_state_as_of_a_world_of_their_own(clock: SimpleNamespace) -> None:
    last = last_of()
    steps(last, clock, 2.0, 5)
    assert last.of_those_left(4, 2) is None, "nobody has asked for it"
    last.tell([2, 0])
    last.note_release()
    last.wait()
    taken = last.of_those_left(4, 2)
    assert taken is not None and taken.ranks == (0, 2) and taken.own == {"world_size": 2, "steps": 4}
    assert last.of_those_left(4, 1) is None, "it is lost itself"
    assert last.of_those_left(5, 2) is None, "a step has been made since"
    with torch.no_grad():
        WEIGHT.add_(1)
    assert last.of_those_left(4, 2) is None, "something has written into it"


def test_a_group_that_is_released_for_another_reason_is_not_waited_for(clock: SimpleNamespace) -> None:
    last = last_of()
    steps(last, clock, 2.0, 5)
    last.note_release()
    last.wait()
    assert last.of_those_left(4, 0) is None
