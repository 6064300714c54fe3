"""Runs beside each other, by values."""

from __future__ import annotations

import math

import pytest

from jupyter_llmcloud.core.run.comparison import ComparedRun, compare
from jupyter_llmcloud.errors import UsageError


def test_what_differs_is_told_and_what_is_alike_is_not() -> None:
    one = ComparedRun("a", "x = 1\ny = 2", {"plan": "ddp", "torch": "2.13"}, {"loss": {0: 2.0, 1: 1.0}})
    other = ComparedRun("b", "x = 1\ny = 3", {"plan": "fsdp", "torch": "2.13", "seed": 3}, {"loss": {0: 2.0, 1: 1.5}})
    found = compare([one, other])
    assert found.facts == [("plan", ["ddp", "fsdp"]), ("seed", [None, 3])]
    assert found.metrics == [("loss", [1.0, 1.5], 1)] and not found.has_same_metrics
    assert "-y = 2" in found.code[0] and "+y = 3" in found.code[0]


def test_the_same_run_again_has_no_difference() -> None:
    run = ComparedRun("a", "x", {"seed": 1}, {"loss": {0: math.nan, 1: 1.0}})
    found = compare([run, ComparedRun("b", "x", {"seed": 1}, {"loss": {0: math.nan, 1: 1.0}})])
    assert found.has_same_metrics and found.code == [""] and not found.facts


def test_a_run_that_ended_earlier_differs_where_it_ended() -> None:
    found = compare([ComparedRun("a", "", {}, {"loss": {0: 1, 1: 1}}), ComparedRun("b", "", {}, {"loss": {0: 1}})])
    assert found.metrics == [("loss", [1, 1], 1)]


def test_values_within_the_tolerance_are_the_same() -> None:
    runs = [ComparedRun("a", "", {}, {"loss": {0: 1.0}}), ComparedRun("b", "", {}, {"loss": {0: 1.0 + 1e-9}})]
    assert not compare(runs).has_same_metrics and compare(runs, 1e-6).has_same_metrics


def test_one_run_cannot_be_compared() -> None:
    with pytest.raises(UsageError, match="at least two"):
        compare([ComparedRun("a", "")])
