"""Memory of a rank under each plan, and what is advised, by values."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.preflight.memory import (
    RankMemory,
    advise,
    describe,
    estimate,
    fits,
    in_words,
    plan_of,
    step_time,
)
from jupyter_llmcloud.core.preflight.timeline import MeasuredStep, Roles, held, peaks
from jupyter_llmcloud.errors import UsageError

STEP = MeasuredStep(400, 400, 800, 1000, 100, 2400, num_parameters=100, flops=1_000_000, batch=8, largest_block=40)


@pytest.mark.parametrize(
    ("plan", "num_ranks", "state", "peak"),
    [
        ("ddp", 1, 1600, 2400),
        ("ddp", 2, 1600, 2800),  # and DDP's buckets
        ("fsdp", 4, 400, 1470),
        ("hsdp:2x2", 4, 800, 1820),
        ("tp:2", 2, 800, 1700),
        ("pipeline:4", 4, 400, 600),
        ("diloco:10", 2, 1600, 3600),  # its round, in which activations have gone, needs more than the step
        ("diloco:10,fragments=2", 2, 1600, 3200),
        ("async-ps", 2, 1600, 4800),  # two more vectors for what is pulled, and a server's share of arrivals
        ("local-sgd:10", 2, 1600, 2400),  # the vector that travels is smaller than what a step holds
    ],
)
def test_each_plan_spreads_what_a_rank_holds(plan: str, num_ranks: int, state: int, peak: int) -> None:
    found = estimate(STEP, plan_of(plan, num_ranks), num_ranks)
    assert (found.parameters + found.gradients + found.optimizer, found.peak) == (state, peak)


def test_a_world_that_the_plan_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match="needs 4 ranks"):
        plan_of("hsdp:2x2", 2)


def test_a_host_keeps_more_room_than_a_gpu() -> None:
    assert fits(85, RankMemory(100, "H100")) and not fits(85, RankMemory(100)) and fits(80, RankMemory(100))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1 << 10, "1 KiB"),
        (1000 << 20, "0.977 GiB"),
        (999 << 30, "999 GiB"),
        (1650 << 30, "1.61 TiB"),
        (3 << 60, "3.07e+03 PiB"),
    ],
)
def test_sizes_are_told_in_a_unit_that_needs_no_exponent(num_bytes: int, text: str) -> None:
    assert in_words(num_bytes) == text


def test_a_step_that_takes_long_is_told_in_hours_or_days() -> None:
    lines = describe(STEP, plan_of("ddp", 1), 1, RankMemory(10_000, flops_per_s=1e6 / 478_000))
    assert any(line.startswith("About 10 d 1 h a step") for line in lines), lines


def test_what_is_not_counted_is_said_with_about() -> None:
    rows = describe(STEP, plan_of("fsdp", 4), 4, RankMemory(1000))
    about = [line.split()[0] for line in rows if "about" in line and not line.startswith("  ")]
    assert about == ["buffers", "peak", "It"]
    assert all("(about " in line for line in rows if line.startswith(("  fits: ", "  less: ")))


def test_every_advice_that_is_given_fits() -> None:
    budget = RankMemory(2000)
    advice = advise(STEP, plan_of("ddp", 4), 4, budget)
    assert advice and all(each.fits and fits(each.peak, budget) for each in advice)
    assert "--plan fsdp" in [each.change for each in advice]


def test_where_nothing_fits_the_nearest_is_named() -> None:
    advice = advise(STEP, plan_of("ddp", 2), 2, RankMemory(100))
    assert len(advice) == 2 and not any(each.fits for each in advice)


def test_the_verdict_and_the_guess_are_said() -> None:
    lines = describe(STEP, plan_of("ddp", 1), 1, RankMemory(10_000, flops_per_s=1e6))
    assert any(line.startswith("It fits") for line in lines)
    assert step_time(STEP, plan_of("ddp", 1), 1, RankMemory(1, flops_per_s=1e6)) == pytest.approx(1 / 0.55)
    assert not any(line.strip().startswith(("fits:", "less:")) for line in lines)


def test_bytes_are_said_in_units() -> None:
    assert [in_words(size) for size in (12, 2048, 3 << 20, 5 << 29)] == ["12 bytes", "2 KiB", "3 MiB", "2.5 GiB"]


def test_peaks_leave_out_what_came_before_the_step() -> None:
    events = [(0, 100), (1, 900), (1, -900), (2, 50), (3, 100), (2, -50), (4, 30), (4, -30)]
    roles = Roles({0}, {3}, set())
    assert peaks(events, roles, begin=3, update=6) == (50, 30, 250)
    assert held(events, {0, 3}) == 200
