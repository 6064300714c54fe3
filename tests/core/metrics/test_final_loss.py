"""Where a loss will be in the end: foretold where a power law holds, and not said where it does not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import fmean, median

import pytest

from jupyter_llmcloud.core.metrics.final_loss import FinalLoss, foretell
from jupyter_llmcloud.core.metrics.forecasts import Forecasts
from jupyter_llmcloud.core.metrics.series import MetricCollector

STEPS = 1000
CONSTANT = [(step, 3e-4) for step in range(1, STEPS)]


def curve(seed: int, shape: Callable[[float, float], float]) -> tuple[list[tuple[float, float]], float]:
    """Noisy losses of a run, and the true one of its last step."""
    dice = random.Random(seed)
    floor, scale, exponent, noise = (dice.uniform(*span) for span in ((0.5, 3), (2, 8), (0.15, 0.9), (0.01, 0.1)))

    def at(step: float) -> float:
        return shape(step, floor + scale * step**-exponent)

    losses = [(float(step), at(step) * math.exp(dice.gauss(0, noise))) for step in range(1, STEPS + 1)]
    return losses, at(STEPS)


def test_a_power_law_is_foretold_more_closely_than_by_what_the_loss_is_now() -> None:
    held, errors, plain = [], [], []
    for seed in range(8100, 8130):
        losses, truth = curve(seed, lambda _, loss: loss)
        if (found := foretell(losses[: STEPS // 2], STEPS, CONSTANT)) is not None:
            held.append(found.low <= truth <= found.high)
            errors.append(abs(found.middle - truth) / truth)
            plain.append(abs(fmean(loss for _, loss in losses[STEPS // 2 - 50 : STEPS // 2]) - truth) / truth)
    assert len(held) >= 8 and fmean(held) >= 0.75
    assert median(errors) < median(plain) / 2


def test_nothing_is_said_of_a_curve_whose_fit_would_not_have_foretold_its_own_past() -> None:
    for seed in range(20):
        losses, _ = curve(seed, lambda step, loss: loss * (0.7 if step > STEPS / 3 else 1))
        assert foretell(losses[: STEPS // 2], STEPS, CONSTANT) is None


def test_nothing_is_said_while_the_learning_rate_changes_or_nobody_logs_it_or_too_early() -> None:
    losses, _ = curve(8101, lambda _, loss: loss)
    known = next(n for n in range(300, STEPS, 50) if isinstance(foretell(losses[:n], STEPS, CONSTANT), FinalLoss))
    assert foretell(losses[:known], STEPS, [(step, 3e-4 * (1 - step / STEPS)) for step in range(1, known)]) is None
    assert foretell(losses[:known], STEPS, []) is None
    assert foretell(losses[:known], 6 * known, CONSTANT) is None
    assert foretell(losses[:20], 20, CONSTANT) is None


def test_it_is_said_beside_the_loss_while_a_bar_tells_how_far_the_run_is() -> None:
    metrics, said = MetricCollector(), Forecasts()
    for step in range(1, 501):
        values = {"loss": 2 + 6 * step**-0.5, "lr": 1e-3}
        metrics.feed(0, [{"step": step, "values": values, "t": step}, {"progress": [step, 1000], "t": step}])
    text = said.text("loss", metrics.series, metrics.progress)
    assert text.startswith("about 2.19 (2.1") or text.startswith("about 2.2 (2.1")
    assert said.text("lr", metrics.series, metrics.progress) == ""


@pytest.mark.parametrize("first", [7000, 9900], ids=["no-early-part", "the-very-end"])
def test_nothing_is_said_of_a_curve_that_begins_late(first: int) -> None:
    """As that of a run which goes on from a checkpoint: the law has nothing to be fitted to."""
    losses = [(float(step), 2 + 6 * step**-0.5) for step in range(first, 10_000)]
    assert foretell(losses, 12_000, [(step, 1e-3) for step, _ in losses]) is None


def test_a_loss_that_explodes_is_not_foretold() -> None:
    losses = [(float(step), 1e200 * step) for step in range(1, STEPS)]
    assert foretell(losses, STEPS, CONSTANT) is None


def logged(metrics: MetricCollector, step: int, *bar: float) -> None:
    metrics.feed(0, [{"step": step, "values": {"loss": 2 + 6 * step**-0.5, "lr": 1e-3}, "progress": [*bar]}])


def test_the_bar_of_a_later_epoch_tells_nothing_of_the_end() -> None:
    metrics, told = MetricCollector(), Forecasts()
    for step in range(1, 2601):
        logged(metrics, step, (step - 1) % 1000 + 1, 1000)
        said = told.text("loss", metrics.series, metrics.progress) if step % 50 == 0 else ""
        assert bool(said) <= (step < 1000), (step, said)


@pytest.mark.parametrize("bar_from", [0, 4000], ids=["of-what-is-left", "of-all-of-it"])
def test_a_run_that_goes_on_is_foretold_for_the_end_of_its_bar(bar_from: int) -> None:
    """Whether its bar counts the steps of the run before it or not, the end is that at step 10,000."""
    metrics, told = MetricCollector(), Forecasts()
    for step in range(4001, 7501):
        logged(metrics, step, step - 4000 + bar_from, 6000 + bar_from)
    said = told.text("loss", metrics.series, metrics.progress)
    assert said.startswith("about 2.06 ("), said
