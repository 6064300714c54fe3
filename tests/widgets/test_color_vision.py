"""Colours that stand beside each other are told apart with each of the three common deficiencies of colour vision."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from tests.widgets.color_vision import DEFICIENCIES, difference, lightened

SHARED = Path(__file__).parents[2] / "labextension" / "src" / "shared"
CURVES, AREAS, DOTS = 30.0, 15.0, 15.0  # a thin curve needs more than an area; states have words and shapes beside them
LIFT = 0.25  # of colours on dark pages: --llmc-lift


def compared() -> list[str]:
    source = (SHARED / "components" / "chart" / "palette.ts").read_text(encoding="utf-8")
    found = re.search(r"COMPARED = \[([^\]]+)\]", source)
    assert found
    return re.findall(r"#[0-9a-f]{6}", found[1])


def declared(pattern: str, css: str) -> list[tuple[str, str]]:
    return re.findall(pattern, (SHARED / "style" / css).read_text(encoding="utf-8"))


def closest(colors: list[str], deficiency: str) -> float:
    return min(difference(one, other, deficiency) for one, other in itertools.combinations(colors, 2))


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_curves_of_compared_runs_differ(deficiency: str) -> None:
    colors = compared()
    assert len(colors) == 4
    assert closest(colors, deficiency) >= CURVES
    assert closest([lightened(color, LIFT) for color in colors], deficiency) >= CURVES


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_parts_of_a_ranks_time_differ(deficiency: str) -> None:
    parts = dict(declared(r"\[data-part='(\w+)'\] \{\s*background: (#[0-9a-f]{6})", "run-monitor.css"))
    assert len(parts) == 5
    assert closest([*parts.values()], deficiency) >= AREAS


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_states_of_ranks_differ(deficiency: str) -> None:
    states = declared(r"--llmc-(accent|good|warn|bad): (#[0-9a-f]{6})", "base.css")
    light, dark = dict(reversed(states)), dict(states)  # what a dark page has others of stands last
    assert len(light) == 4 and light != dark
    for theme in (light, dark):
        assert closest([*theme.values()], deficiency) >= DOTS


def test_a_difference_is_that_of_the_eye() -> None:
    assert difference("#000000", "#ffffff") == pytest.approx(100, abs=0.1)
    red, green = "#c00000", "#608000"
    assert difference(red, green, "deuteranopia") < difference(red, green) / 3
