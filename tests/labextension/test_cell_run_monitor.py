"""The monitor of a run in its cell: grown live, zoomed, stopped; found again after a reload and without its kernel."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.support import browser
from tests.support.lab import Lab, open_lab

pytestmark = [pytest.mark.story, pytest.mark.browser, pytest.mark.slow]

CARD = ".llmc-run"
PLOT = f"{CARD} .llmc-plot"
LOSS = f'{CARD} [data-metric="loss"] .llmc-plot'

RUN = """%%distribute -n 2 --name monitored
import math, time
for step in range(100_000):
    run.log(loss=1 / (step + 1) + rank + math.sin(step / 9) / 5, spike=900.0 if step == 30 else 1 + math.sin(step), step=step)
    if step % 25 == 0:
        print("at step", step)
    time.sleep(0.02)
"""


def wait_for_step(page: Page, step: float) -> None:
    """Until the chart reaches beyond a step."""
    page.wait_for_function(
        "([plot, step]) => Number(document.querySelector(plot)?.dataset.to ?? 0) > step",
        arg=[LOSS, step],
        timeout=60_000,
    )


def drag(page: Page, selector: str, first: float, last: float) -> None:
    """Drag over a plot, from one share of its width to another."""
    box = page.locator(f"{selector} .u-over").bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + first * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + (first + last) / 2 * box["width"], middle, steps=4)
    page.mouse.move(box["x"] + last * box["width"], middle, steps=4)
    page.mouse.up()


def shown_steps(page: Page) -> tuple[float, float]:
    plot = page.locator(LOSS)
    return float(plot.get_attribute("data-from") or 0), float(plot.get_attribute("data-to") or 0)


def test_a_run_is_watched_zoomed_found_again_after_a_reload_and_stopped(
    context: BrowserContext, lab: Lab, notebooks: Path, pictures: Path
) -> None:
    cells = ["%load_ext jupyter_llmcloud", RUN, "%world stop"]
    path = browser.write_notebook(notebooks / "monitored.ipynb", cells)
    page = open_lab(context, lab, path.name)
    browser.run_cell(page, 0)
    browser.start_cell(page, 1)
    wait_for_step(page, 60)
    _, before = shown_steps(page)
    wait_for_step(page, before)
    expect(page.locator(f"{CARD} .llmc-chip")).to_have_text(["rank 0running", "rank 1running"])
    expect(page.locator(f'{CARD} [data-metric="spike"] .llmc-chart-note')).to_contain_text("up to 900 above")
    for theme, name in ((browser.LIGHT, "light"), (browser.DARK, "dark")):
        browser.set_theme(page, theme)
        page.locator(CARD).screenshot(path=pictures / f"run-monitor-{name}.png")

    drag(page, LOSS, 0.25, 0.5)
    expect(page.get_by_role("button", name="show the whole of loss")).to_be_visible()
    low, high = shown_steps(page)
    assert 0 < low < high
    page.wait_for_function("(plot) => Number(document.querySelector(plot).dataset.window) > 0", arg=LOSS)
    page.locator(f"{LOSS} .u-over").hover()
    expect(page.locator(f'{CARD} [data-metric="loss"] .llmc-rank-values')).to_have_text(
        re.compile(r"^at step [\d,]+ · rank 0: .* · rank 1: ")
    )
    page.locator(CARD).screenshot(path=pictures / "run-monitor-zoomed.png")
    page.locator(f"{LOSS} .u-over").dblclick()
    expect(page.get_by_role("button", name="show the whole of loss")).to_have_count(0)

    browser.save(page)
    _, seen = shown_steps(page)
    page.reload()
    wait_for_step(page, seen)
    first, _ = shown_steps(page)
    assert first < 5  # from the first step on; a column of several stands at their middle
    for words in ("Loading widget", "Error displaying widget"):
        expect(page.locator(".jp-OutputArea-output:visible").filter(has_text=words)).to_have_count(0)
    page.locator(f"{CARD} summary", has_text="Output of the ranks").click()
    expect(page.locator(f"{CARD} .llmc-text")).to_contain_text("[1] at step 0")
    page.get_by_role("tab", name="rank 1").click()
    page.get_by_role("searchbox", name="Search the output").fill("step 25")
    expect(page.locator(f"{CARD} .llmc-text > div").first).to_have_text("at step 25")
    page.locator(CARD).screenshot(path=pictures / "run-monitor-reloaded.png")
    page.get_by_role("button", name="Stop monitored").click()
    expect(page.locator(f"{CARD} .llmc-state")).to_have_text("stopped", timeout=60_000)
    page.locator(CARD).screenshot(path=pictures / "run-monitor-stopped.png")
    browser.run_cell(page, 2)
    browser.set_theme(page, browser.LIGHT)
    browser.end_kernel(page)
    page.close()
