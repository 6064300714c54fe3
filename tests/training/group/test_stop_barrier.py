"""Where a Stop may land when several optimizers step in one iteration of the loop: tested by values."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.training.group.stop_barrier import MAX_STEPS, Iterations, Steps


class Optimizer:
    """Something that steps."""


CRITIC, GENERATOR, OTHER = Optimizer(), Optimizer(), Optimizer()


def complete_after(*order: Optimizer) -> list[int]:
    """The numbers of the steps with which an iteration was complete."""
    iterations = Iterations()
    return [number for number, optimizer in enumerate(order, 1) if iterations.step(optimizer)]


def test_one_optimizer_completes_an_iteration_with_every_step() -> None:
    assert complete_after(*[CRITIC] * 5) == [1, 2, 3, 4, 5]


def test_two_optimizers_complete_an_iteration_when_both_have_stepped() -> None:
    assert complete_after(*[CRITIC, GENERATOR] * 4)[1:] == [2, 4, 6, 8]


def test_three_optimizers_complete_an_iteration_when_all_have_stepped() -> None:
    assert complete_after(*[CRITIC, GENERATOR, OTHER] * 4)[2:] == [3, 6, 9, 12]


def test_a_critic_that_steps_five_times_is_waited_for() -> None:
    iteration = [CRITIC] * 5 + [GENERATOR]
    assert complete_after(*iteration * 4)[5:] == [6, 12, 18, 24]


def test_an_optimizer_of_an_earlier_part_of_the_cell_is_forgotten() -> None:
    steps = complete_after(*[OTHER] * 20, *[CRITIC] * 20, *[CRITIC, GENERATOR] * 10)
    assert {*range(25, 41)} <= {*steps}
    assert [step for step in steps if step > 42] == [*range(44, 61, 2)]


def test_an_optimizer_that_is_gone_is_not_waited_for() -> None:
    iterations, first = Iterations(), Optimizer()
    for _ in range(3):
        iterations.step(first)
        iterations.step(CRITIC)
    del first
    assert iterations.step(CRITIC)


def test_a_stop_lands_where_all_optimizers_have_stepped_equally_often() -> None:
    for limit in (5, 6):
        steps, num = Steps(), {CRITIC: 0, GENERATOR: 0}
        steps.stop_at(limit)
        with pytest.raises(KeyboardInterrupt):
            while True:
                for optimizer in num:
                    num[optimizer] += 1
                    steps.boundary(optimizer)
        assert num == {CRITIC: 3, GENERATOR: 3}


def test_an_iteration_that_never_completes_does_not_hold_a_stop_up() -> None:
    steps, optimizers = Steps(), [Optimizer() for _ in range(3 * MAX_STEPS)]
    for optimizer in optimizers:
        steps.boundary(optimizer)
    steps.stop_at(steps.count + 1)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(MAX_STEPS + 1):
            steps.boundary(optimizers[0])
