"""What a program is told of numbers that nobody has computed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from jupyter_llmcloud.training.preflight.tracker import AllocationTracker


def _redraws() -> None:
    torch.nn.init.trunc_normal_(torch.nn.Linear(8, 8).weight, std=0.02)


def _waits_for_true() -> None:
    number = torch.rand(3)
    while not (number < 0).any():
        number = number - 1


def _waits_for_false() -> None:
    number = torch.rand(3)
    while (number > 0).all() or (number > 1).all():
        number = number - 1


def _comes_near() -> None:
    number = torch.rand(3).sum()
    while number.item() > 0.5:
        number = number / 2


@pytest.mark.parametrize("program", [_redraws, _waits_for_true, _waits_for_false, _comes_near])
def test_a_loop_that_waits_for_a_number_ends(program: Callable[[], None]) -> None:
    with AllocationTracker(is_fake=True, most=1 << 30) as tracker:
        tracker.ends_at = time.monotonic() + 30
        for _ in range(3):
            program()


def test_what_is_asked_now_and_then_is_true() -> None:
    with AllocationTracker(is_fake=True, most=1 << 30):
        answers = [(bool((torch.rand(3) > 0).any()), torch.rand(3).sum().item()) for _ in range(4)]
    assert answers == [(True, 1.0)] * 4
