"""Numbers as people read them."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.output.numerals import format_step, sparkline
from jupyter_llmcloud.core.run.comparison import ComparedRun, compare
from jupyter_llmcloud.magics.recorded.compare import ComparisonReport, verdict


@pytest.mark.parametrize(
    ("step", "text"), [(60, "60"), (60.0, "60"), (1234567.0, "1234567"), (0.5, "0.5"), (float("nan"), "nan")]
)
def test_a_step_has_all_of_its_digits(step: float, text: str) -> None:
    assert format_step(step) == text


def test_runs_that_part_late_are_told_by_the_step() -> None:
    found = compare([ComparedRun(name, "", {}, {"loss": {0: 1.0, 1234567: at}}) for name, at in (("a", 0.5), ("b", 1))])
    assert "differs from step 1234567 on" in verdict(found)
    assert "apart from step 1234567" in repr(ComparisonReport(found))


def test_numbers_whose_distance_is_none_are_drawn() -> None:
    assert sparkline([-1.7e308, 0.0, 1.7e308]) == "▁▅█"
    assert sparkline([-2.0, -1.0, 2.0]) == "▁▃█"
