"""Whatever is read in a view has a contrast of at least 4.5 to its paper: computed from the style as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jupyter_llmcloud.widgets import chart, static_view

ENOUGH = 4.5
SHEETS = Path(__file__).parents[2] / "labextension/src/shared/style"
OF_A_RUN = ("base.css", "run-monitor.css", "chart.css")
STYLE = "".join((SHEETS / name).read_text(encoding="utf-8") for name in OF_A_RUN)
DARK = "jp-theme-light"
PAPER = {"light": "#ffffff", "dark": "#111111"}
# JupyterLab's own: 87 % and 54 % of black on white, and 100 % and 70 % of white on its dark paper.
THEME = {
    "light": {"--jp-ui-font-color1": "#212121", "--jp-ui-font-color2": "#757575"},
    "dark": {"--jp-ui-font-color1": "#ffffff", "--jp-ui-font-color2": "#b8b8b8"},
}


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def rules() -> list[tuple[str, dict[str, str]]]:
    """(selectors, declarations) of the style sheet."""
    plain = re.sub(r"/\*.*?\*/", "", STYLE, flags=re.DOTALL)
    found = []
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", plain):
        pairs = (part.split(":", 1) for part in body.split(";") if ":" in part)
        found.append((" ".join(selectors.split()), {name.strip(): value.strip() for name, value in pairs}))
    return found


def variables(theme: str) -> dict[str, str]:
    known: dict[str, str] = {}
    for selectors, declared in rules():
        if ".llmc-card" in selectors and (DARK not in selectors or theme == "dark"):
            known |= {name: value for name, value in declared.items() if name.startswith("--llmc-")}
    return known


def resolved(value: str, known: dict[str, str], theme: dict[str, str]) -> str:
    """The colour that a value comes to; with no theme its last fallback."""
    while found := re.fullmatch(r"var\((--[\w-]+)(?:,\s*(.+))?\)", value):
        name, fallback = found[1], found[2] or ""
        value = known.get(name) or theme.get(name) or fallback
    return value


def text_colors() -> set[str]:
    """Every value that text is written in."""
    colors = set()
    for selectors, declared in rules():
        if "color" in declared and declared["color"] != "inherit":
            colors.add(declared["color"])
        if "fill" in declared and re.search(r"\btext\b", selectors):
            colors.add(declared["fill"])
    return colors


def test_the_style_names_the_colours_of_its_text() -> None:
    assert len(text_colors()) >= 4
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("value", sorted(text_colors()))
def test_text_of_the_live_view_can_be_read(theme: str, value: str) -> None:
    color = resolved(value, variables(theme), THEME[theme])
    assert contrast(color, PAPER[theme]) >= ENOUGH, (value, color)


@pytest.mark.parametrize("value", sorted(text_colors()))
def test_text_of_the_live_view_can_be_read_on_a_page_without_a_theme(value: str) -> None:
    color = resolved(value, variables("light"), {})
    assert contrast(color, "#ffffff") >= ENOUGH, (value, color)


@pytest.mark.parametrize(
    "color", [*chart.PALETTE, chart.GREY, chart.RED, *(color for _, color in static_view._MARKS.values())]
)
def test_text_of_the_saved_view_can_be_read(color: str) -> None:
    assert contrast(color, "#ffffff") >= ENOUGH
    assert contrast(color, PAPER["dark"]) >= 3.9  # the image does not know where it is shown
