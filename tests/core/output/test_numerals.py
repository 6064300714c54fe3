"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from jupyter_llmcloud.core.metrics.series import MetricCollector, Series
from jupyter_llmcloud.core.metrics.wording import warning
from jupyter_llmcloud.core.output.numerals import format_count, format_step, sparkline
from jupyter_llmcloud.core.output.progress_line import progress_line
from jupyter_llmcloud.core.run.comparison import ComparedRun, compare
from jupyter_llmcloud.magics.recorded.compare import ComparisonReport, verdict


@pytest.mark.parametrize(
    ("step", "text"), [(60, "60"), (60.0, "60"), (1234567.0, "1234567"), (0.5, "0.5"), (float("nan"), "nan")]
)
def test_a_step_has_all_of_its_digits(step: float, text: str) -> None:
    assert format_step(step) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7"), (12_345_678, "12,345,678"), (12_345_678.0, "12,345,678"), (0.25, "0.25"), (1e300, "1e300")],
)
def test_what_is_counted_has_all_of_its_digits(count: float, text: str) -> None:
    assert format_count(count) == text


def test_a_late_step_can_be_found_by_what_is_said_of_it() -> None:
    series = Series("loss")
    for step, value in ((12_345_678, 1.0), (12_345_679, math.nan)):
        series.add(step, value, rank=0)
    assert warning(series) == "NaN since step 12,345,679 · 1 not finite, first at step 12,345,679"
    metrics = MetricCollector()
    metrics.feed(0, [{"progress": [12_345_678, 20_000_000], "t": 1.0}])
    assert "12,345,678/20,000,000" in progress_line("long", "running", metrics, 1.0, 1.0, 80)


def test_runs_that_part_late_are_told_by_the_step() -> None:
    found = compare([ComparedRun(name, "", {}, {"loss": {0: 1.0, 1234567: at}}) for name, at in (("a", 0.5), ("b", 1))])
    assert "differs from step 1234567 on" in verdict(found)
    assert "apart from step 1234567" in repr(ComparisonReport(found))


def test_numbers_whose_distance_is_none_are_drawn() -> None:
    assert sparkline([-1.7e308, 0.0, 1.7e308]) == "▁▅█"
    assert sparkline([-2.0, -1.0, 2.0]) == "▁▃█"
