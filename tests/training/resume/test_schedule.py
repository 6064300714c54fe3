"""When a checkpoint is due, and when one may come soon: decided by counts of steps."""

from __future__ import annotations

from jupyter_llmcloud.training.resume.schedule import CheckpointSchedule, SaveRequest


def test_a_periodic_checkpoint_is_due_every_so_many_steps_and_may_be_left_out() -> None:
    schedule = CheckpointSchedule(every=4)
    assert {step: schedule.due(step) for step in range(1, 10) if schedule.due(step)} == {
        4: SaveRequest(waits=False),
        8: SaveRequest(waits=False),
    }


def test_one_that_the_agent_asks_for_is_due_once_at_its_step_or_after_it_and_is_not_left_out() -> None:
    schedule = CheckpointSchedule()
    schedule.ask_at(5)
    assert [schedule.due(step) for step in (4, 7, 8)] == [None, SaveRequest(waits=True), None]


def test_what_was_asked_for_can_be_taken_back() -> None:
    schedule = CheckpointSchedule()
    schedule.ask_at(5)
    schedule.ask_at(-1)
    assert schedule.due(6) is None


def test_one_is_soon_within_twice_the_steps_between_two_batches() -> None:
    schedule = CheckpointSchedule(every=10)
    assert [step for step in range(20) if schedule.is_soon(step)] == [8, 9, 18, 19]


def test_a_loop_with_more_steps_to_a_batch_is_told_earlier() -> None:
    schedule = CheckpointSchedule(every=10)
    assert [step for step in range(0, 20, 2) if schedule.is_soon(step)] == [6, 8, 16, 18]


def test_one_may_come_at_any_time_where_the_cell_or_the_agent_asks_or_one_came_late() -> None:
    assert CheckpointSchedule(is_asked_by_cell=True).is_soon(0)
    assert not CheckpointSchedule().is_soon(0)
    asked, late = CheckpointSchedule(), CheckpointSchedule(every=100)
    asked.ask_at(50)
    late.note_late()
    assert asked.is_soon(1)
    assert late.is_soon(1)
