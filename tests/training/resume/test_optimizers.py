"""Whether gradients wait for an optimizer's next step, told by what a loop has done so far."""

from __future__ import annotations

import torch

from jupyter_llmcloud.training.resume.cell.optimizers import SteppedOptimizers


def trained(drops: bool, num_steps: int, keeps_from: int = 1000) -> tuple[SteppedOptimizers, torch.optim.Optimizer]:
    """After so many steps of a loop that drops its gradients after each, or keeps them, perhaps later on."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizers, optimizer = SteppedOptimizers(), torch.optim.SGD([weight], lr=0.1)
    for number in range(num_steps):
        optimizers.note_batch()
        optimizers.note_backward()
        weight.sum().backward()
        optimizer.step()
        optimizers.note_step(optimizer)
        if drops and number < keeps_from:
            optimizer.zero_grad()
    return optimizers, optimizer


def test_a_loop_that_drops_its_gradients_has_none_after_a_step() -> None:
    optimizers, optimizer = trained(drops=True, num_steps=3)
    assert not optimizers.may_have_gradients(optimizer)


def test_a_loop_that_keeps_its_gradients_has_some_after_a_step() -> None:
    optimizers, optimizer = trained(drops=False, num_steps=3)
    assert optimizers.may_have_gradients(optimizer)


def test_a_loop_that_keeps_them_after_many_steps_that_dropped_them_is_found_out() -> None:
    optimizers, optimizer = trained(drops=True, num_steps=32, keeps_from=30)
    assert optimizers.may_have_gradients(optimizer)


def test_what_a_loop_does_with_them_is_not_known_after_one_step() -> None:
    optimizers, optimizer = trained(drops=True, num_steps=1)
    assert optimizers.may_have_gradients(optimizer)


def test_a_backward_pass_since_the_step_has_made_some() -> None:
    optimizers, optimizer = trained(drops=True, num_steps=3)
    assert not optimizers.is_between_steps
    optimizers.note_batch()
    optimizers.note_backward()
    assert optimizers.may_have_gradients(optimizer)
    assert optimizers.is_between_steps


def test_an_optimizer_is_known_while_it_lives() -> None:
    optimizers, optimizer = trained(drops=True, num_steps=1)
    assert list(optimizers) == [optimizer]
    assert optimizer in optimizers
    del optimizer
    assert list(optimizers) == []
