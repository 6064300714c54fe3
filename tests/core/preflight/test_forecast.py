"""What a rank is told before its first step: by values."""

from __future__ import annotations

from jupyter_llmcloud.core.parallel.plan import parse_plan
from jupyter_llmcloud.core.preflight.forecast import forecast, may_matter, state_bytes, still_needed
from jupyter_llmcloud.core.preflight.timeline import MeasuredStep

GIB = 1 << 30
STEP = MeasuredStep(GIB, GIB, 2 * GIB, 3 * GIB, 0, 7 * GIB, batch=8, largest_block=GIB // 8)


def test_a_step_that_fits_is_worth_no_word() -> None:
    assert forecast(STEP, parse_plan("ddp"), 1, 20 * GIB, "cpu") == ""


def test_a_step_that_does_not_fit_is_told_with_its_parts_and_what_would() -> None:
    said = forecast(STEP, parse_plan("ddp"), 2, 6 * GIB, "cpu")
    assert "needs about 8.48 GiB beside its parameters" in said and "6 GiB of cpu memory is left" in said
    assert "gradients 1 GiB, the optimizer 2 GiB, activations 3 GiB, communication 1 GiB" in said
    assert "Would fit: " in said and "a batch of" in said


def test_what_was_not_worked_out_is_said() -> None:
    said = forecast(STEP, parse_plan("ddp"), 1, GIB, "cpu", ["activations, which could not be worked out"])
    assert "without activations, which could not be worked out" in said


def test_a_sharded_step_needs_its_share_alone() -> None:
    assert still_needed(STEP, parse_plan("fsdp"), 4, "gpu") < still_needed(STEP, parse_plan("ddp"), 4, "gpu") * 0.7


def test_the_state_of_an_optimizer_follows_from_its_class() -> None:
    assert state_bytes("AdamW", {"amsgrad": False}, 100) == 200
    assert state_bytes("Adam", {"amsgrad": True}, 100) == 300
    assert state_bytes("SGD", {"momentum": 0}, 100) == 0
    assert state_bytes("SGD", {"momentum": 0.9}, 100) == 100
    assert state_bytes("Shampoo", {}, 100) == 0


def test_only_steps_that_can_be_large_are_looked_at() -> None:
    assert not may_matter(1 << 20, 1000, 16 * GIB)
    assert may_matter(GIB, 0, 16 * GIB)
    assert may_matter(1 << 20, 50_000_000, 16 * GIB)
