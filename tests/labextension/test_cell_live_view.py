"""The live view as people see it: in JupyterLab while a cell runs, in the saved notebook afterwards."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import BrowserContext, Page, Route, expect

from jupyter_llmcloud.core.output import numerals
from jupyter_llmcloud.widgets.panel_mime import PANEL_MIME
from jupyter_llmcloud.widgets.run_monitor import STATIC
from tests.support import browser
from tests.support.lab import Lab, open_lab

pytestmark = pytest.mark.browser

PATIENCE_MS = 120_000  # on a machine that is busy
STOP_ROUTE = re.compile(r"/llmcloud/api/runs/[^/]+/stop$")
LIVE_VIEW = STATIC / "run-monitor.js"
ASK_JAVASCRIPT = """async ([source, values, durations]) => {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { formatNumber, formatDuration } = await import(url);
    return [values.map((value) => formatNumber(value)), durations.map(formatDuration)];
}"""
CARD = ".llmc-run"
CHART = f"{CARD} .llmc-chart"
PLOT = f"{CHART} .llmc-plot"

FEED = """
import math, pathlib, random, time
from jupyter_llmcloud.widgets.live_view import LiveView

TOTAL, SHORT = 3000, 40

def feed(view, step, now):
    noise = random.Random(step)
    for rank in (0, 1):
        loss = 0.9 + 4 * math.exp(-step / 500) + noise.gauss(0, 0.06) * (1 + rank)
        grad_norm = abs(noise.gauss(1.2, 0.2)) + 3 / (1 + step / 80)
        values = {"loss": math.nan if 600 < step < 640 else loss, "grad_norm": grad_norm}
        if rank == 0:
            decay = 0.5 + 0.5 * math.cos(math.pi * step / TOTAL)
            values["learning_rate"] = 3e-4 * min(1, step / 300) * decay
        records = [{"seq": 2 * step + 1, "t": now, "step": step, "values": values},
                   {"seq": 2 * step + 2, "t": now, "progress": [step + 1, TOTAL], "desc": "training"}]
        view.handle_metrics(rank, records)
"""
UNTIL_STOPPED = """
view = LiveView("demo-20260101-000000-abc", "pydoc-gpt", [0, 1], lambda: None)
for rank in (0, 1):
    view.handle_rank_state(rank, "running")
flag, step = pathlib.Path("stop-flag"), 0
while not flag.exists() and step < TOTAL:
    while step == SHORT and not pathlib.Path("seen-short").exists():
        time.sleep(0.02)  # the page measures the short chart
    for _ in range(20):
        feed(view, step, time.time())
        step += 1
    view.refresh(time.time())
    time.sleep(0.03 if step < 640 else 0.1)  # a training step
for rank in (0, 1):
    view.handle_rank_state(rank, "stopped")
view.finish("stopped", time.time())
"""
IN_BACKGROUND = """
view = LiveView("bg-1", "in-background", [0, 1], lambda: view.finish("stopped", time.time()))
for step in range(50):
    feed(view, step, time.time())
view.refresh(time.time())
"""
OUTPUT = """
import pathlib, time
from jupyter_llmcloud.magics.output.run_view import RunDisplay

view = RunDisplay("shown-1", "shown", [0, 1], lambda: None)
seq = 0

def log(rank, kind, text="", **more):
    global seq
    seq += 1
    view.records("logs", rank, [{"seq": seq, "t": time.time(), "kind": kind, "text": text, **more}])

def go_on(seconds, until=lambda: False):
    end = time.time() + seconds
    while time.time() < end and not until():
        view.tick()
        time.sleep(min(0.05, view.next_tick_s()))
"""
SHOWN = """
for step in range(20):
    view.records("metrics", 0, [{"seq": step + 1, "t": time.time(), "step": step, "values": {"loss": 1 / (step + 1)}}])
log(0, "stdout", "kept\\n")
go_on(0.5)
log(1, "stderr", "\\rbar 50%")
go_on(0.5)
log(1, "stdout", "over the bar\\n")
progress = {"t": time.time(), "progress": [5, 10], "desc": "steps"}
view.records("metrics", 0, [{"seq": 101, **progress}, {"seq": 102, **progress, "t": time.time() + 1, "progress": [6, 10]}])
for rank in (0, 1):
    view.rank_state(rank, "running")
late = "rank 1 is late: <b>here</b>; rank 0 waits in barrier #3. Press Stop to interrupt, or wait.\\n"
log(0, "report", late, late=[1], waiting=[0])
go_on(60, until=pathlib.Path("seen-flag").exists)
log(0, "report", "rank 1 goes on.\\n", recovered=True)
for number in range(30):
    log(1, "clear_output", wait=True)
    log(1, "stdout", f"number {number}\\n")
    go_on(0.02)
log(1, "stderr", "\\rbar 100%\\n")
view.finish("finished")
"""
LOG_SCALES = """
import json
from dataclasses import replace
from jupyter_llmcloud.storage.runs import RunRecord, RunStore

folder = RunStore().folder("scales-1")
folder.create(RunRecord("scales-1", "scales", "running", time.time(), ranks=[0], world_size=1), "")
journal = folder.path / "metrics" / "rank-0000.jsonl"
journal.parent.mkdir(exist_ok=True)
view = LiveView("scales-1", "scales", [0], lambda: None)
view.handle_rank_state(0, "running")
LONG = "a/rather/long/name/of/a/metric/that/ends/in/validation_accuracy"
for step in range(200):
    values = {"loss": 2 + math.sin(step), LONG: 900.0 if step == 100 else 1.0 + math.sin(step) / 9}
    record = {"seq": step + 1, "t": time.time(), "step": step, "values": values}
    view.handle_metrics(0, [record])
    with journal.open("a") as file:
        file.write(json.dumps(record) + "\\n")
view.refresh(time.time())
while folder.log_scales() != [LONG]:
    time.sleep(0.02)
view.finish("finished", time.time())
folder.write(replace(folder.read(), state="finished", ended=time.time()))
"""
HOSTILE = """
name = "<img src=x onerror=window.broken=1>"
view = LiveView("hostile-1", name, [0, 1], lambda: None)
view.handle_rank_state(1, "failed", name)
for seq in (1, 2):
    view.handle_metrics(0, [{"seq": seq, "t": 0.0, "step": seq, "values": {name: 1.0 * seq}}])
view.refresh(time.time())
"""
HOSTILE_END = """
view.finish("failed", time.time(), errors=[{"rank": 1, "ename": "ValueError", "evalue": name}])
"""


@pytest.fixture
def folder(notebooks: Path) -> Path:
    return notebooks


SAVED_HTML = """() => {
    const cell = window.jupyterapp.shell.currentWidget.content.widgets[1];
    return cell.outputArea.model.get(0).data["text/html"];
}"""
CONTRASTS = """(selector) => {
    const numbers = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
    const paperOf = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = numbers(getComputedStyle(at).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    const found = {};
    for (const element of document.querySelectorAll(`${selector}, ${selector} *`)) {
        const own = [...element.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        if (!own) continue;
        const style = getComputedStyle(element);
        const paper = paperOf(element);
        const [r, g, b, alpha = 1] = numbers(element instanceof SVGElement ? style.fill : style.color);
        const ink = [r, g, b].map((v, at) => v * alpha + paper[at] * (1 - alpha));
        const [dark, bright] = [light(ink), light(paper)].sort((one, other) => one - other);
        found[`${element.getAttribute("class") || element.tagName}: ${element.textContent}`] = (bright + 0.05) / (dark + 0.05);
    }
    return found;
}"""
Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def page(context: BrowserContext, lab: Lab) -> Iterator[Page]:
    """One page for all tests: each opens a notebook of its own, and closes it."""
    page = open_lab(context, lab)
    yield page
    browser.set_theme(page, browser.LIGHT)
    page.close()


@pytest.fixture
def opened(page: Page, folder: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """Opens a notebook with these cells, its kernel ended afterwards; `stop` answers the stop route."""
    num_opened = 0

    def open_cells(*cells: str, stop: Callable[[Route], None]) -> Page:
        nonlocal num_opened
        path = browser.write_notebook(folder / f"{request.node.name}.ipynb", cells)
        page.route(STOP_ROUTE, stop)
        browser.open_notebook(page, path.name)
        num_opened += 1
        return page

    yield open_cells
    for _ in range(num_opened):
        browser.close_notebook(page)
    page.unroute_all()


def test_a_chart_grows_while_the_cell_runs_and_stop_leaves_a_static_view(
    opened: Opened, folder: Path, pictures: Path
) -> None:
    asked: list[dict[str, str]] = []

    def stop(route: Route) -> None:
        asked.append(route.request.headers)
        if len(asked) == 2:
            (folder / "stop-flag").touch()
        route.fulfill(json={"state": "stopping"})

    page = opened(FEED, UNTIL_STOPPED, stop=stop)
    browser.run_cell(page, 0)
    browser.start_cell(page, 1)
    see_charts(page)
    expect(page.locator(CHART)).to_have_count(3, timeout=PATIENCE_MS)
    short = int(page.locator(PLOT).first.get_attribute("data-points") or 0)
    (folder / "seen-short").touch()
    page.wait_for_function(
        "([plot, short]) => Number(document.querySelector(plot)?.dataset.points) > 2 * short",
        arg=[PLOT, short],
    )
    expect(page.locator(f"{CARD} [role=progressbar]")).to_have_attribute("aria-valuenow", re.compile(r"^[1-9]"))
    expect(page.locator(f"{CARD} .llmc-chip").first).to_have_text("rank 0running")
    expect(page.locator(f"{CHART} .llmc-chart-note").first).to_contain_text(
        re.compile(r"\d+ values are NaN or infinite"), timeout=PATIENCE_MS
    )
    look(page, pictures)
    button = page.get_by_role("button", name="Stop pydoc-gpt")
    button.click()
    again = page.get_by_role("button", name="Stopping pydoc-gpt; press again to force it")
    expect(again).to_have_text("Stopping…")
    again.click()
    output = browser.wait_for_cell(page, 1)
    assert [headers.get("x-xsrftoken", "") != "" for headers in asked] == [True, True]
    expect(page.locator(CARD)).to_have_count(0)
    expect(output.locator("img")).to_have_count(3)
    expect(output.locator("table")).to_contain_text("learning_rate")
    expect(output).to_contain_text("stopped after")
    for theme, name in ((browser.LIGHT, "light"), (browser.DARK, "dark")):
        browser.set_theme(page, theme)
        page.screenshot(path=pictures / f"static-view-{name}.png")


def see_charts(page: Page) -> None:
    """Scroll to where the charts are: those that nobody sees are not drawn."""
    page.locator(f"{CARD} .llmc-chart-place").last.scroll_into_view_if_needed(timeout=PATIENCE_MS)


def look(page: Page, pictures: Path) -> None:
    """Hover, change a scale, and keep pictures in both themes."""
    card = page.locator(CARD)
    for theme, name in ((browser.LIGHT, "light"), (browser.DARK, "dark")):
        browser.set_theme(page, theme)
        page.mouse.move(5, 5)
        card.screenshot(path=pictures / f"live-view-{name}.png")
        contrasts = page.evaluate(CONTRASTS, CARD)
        assert len(contrasts) > 20 and {words: ratio for words, ratio in contrasts.items() if ratio < 4.5} == {}
        page.locator(f"{CHART} .u-over").first.hover()
        expect(page.locator(f"{CHART} .llmc-readout").nth(1)).to_contain_text("step")
        page.screenshot(path=pictures / f"live-view-hover-{name}.png")
    toggle = page.get_by_role("button", name="logarithmic scale for grad_norm")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    page.locator(f"{CHART} .u-over").nth(1).hover()
    page.locator(CARD).screenshot(path=pictures / "live-view-log.png")


def test_the_saved_notebook_shows_the_run_without_a_kernel(
    opened: Opened, folder: Path, context: BrowserContext, pictures: Path
) -> None:
    (folder / "stop-flag").unlink(missing_ok=True)
    (folder / "seen-short").touch()
    once = UNTIL_STOPPED.replace("TOTAL:", "800:").replace('"stopped"', '"finished"').replace("else 0.1", "else 0.03")
    page = opened(FEED, once, stop=lambda route: route.abort())
    browser.run_cell(page, 0)
    browser.run_cell(page, 1)
    path = folder / "test_the_saved_notebook_shows_the_run_without_a_kernel.ipynb"
    browser.save(page)
    saved = nbformat.read(path, as_version=4)
    (output,) = saved.cells[1].outputs
    assert set(output.data) == {"text/html", "text/plain", PANEL_MIME}
    assert (
        "widgets" not in saved.metadata
        or not saved.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    )
    saved.metadata.pop("widgets", None)
    page_text, _ = HTMLExporter(template_name="lab").from_notebook_node(saved)
    (folder / "saved.html").write_text(page_text, encoding="utf-8")
    shown = context.new_page()
    shown.route(re.compile(r"^https?://"), lambda route: route.abort())
    shown.goto((folder / "saved.html").as_uri())
    expect(shown.locator("body")).to_contain_text("finished in")
    expect(shown.locator("table")).to_contain_text("learning_rate")
    sizes = shown.evaluate("() => [...document.querySelectorAll('img')].map((image) => image.naturalWidth)")
    assert sizes == [320, 320, 320]
    shown.screenshot(path=pictures / "nbconvert.png", full_page=True)


def test_late_ranks_are_told_in_the_view_and_what_a_rank_clears_goes(
    opened: Opened, folder: Path, pictures: Path
) -> None:
    page = opened(OUTPUT, SHOWN, stop=lambda route: route.abort())
    browser.run_cell(page, 0)
    browser.start_cell(page, 1)
    notice = page.locator(f"{CARD} .llmc-notice")
    expect(notice).to_have_text("⚠ rank 1 is late: <b>here</b>", timeout=PATIENCE_MS)
    expect(page.locator(f"{CARD} .llmc-chip")).to_have_text(["rank 0waiting", "rank 1late"])
    expect(page.locator(f"{CARD} .llmc-facts")).to_have_text("6 of 10 · waits for rank 1")
    for theme, name in ((browser.LIGHT, "light"), (browser.DARK, "dark")):
        browser.set_theme(page, theme)
        page.locator(CARD).screenshot(path=pictures / f"notice-{name}.png")
    (folder / "seen-flag").touch()
    output = browser.wait_for_cell(page, 1)
    expect(output.first).to_contain_text("finished in")
    expect(output.first).not_to_contain_text("is late")
    written = [line.rstrip() for text in output.all_inner_texts()[1:] for line in text.split("\n") if line.strip()]
    assert written == [
        "[0] kept",
        "rank 1 is late: <b>here</b>; rank 0 waits in barrier #3. Press Stop to interrupt, or wait.",
        "rank 1 goes on.",
        "[1] number 29",
        "[1] bar 100%",
    ]


def test_charts_fill_the_row_and_a_log_scale_is_kept_in_the_saved_view(
    opened: Opened, folder: Path, pictures: Path
) -> None:
    page = opened(FEED, LOG_SCALES, stop=lambda route: route.abort())
    browser.run_cell(page, 0)
    browser.start_cell(page, 1)
    see_charts(page)
    expect(page.locator(CHART)).to_have_count(2, timeout=PATIENCE_MS)
    row = page.locator(f"{CARD} .llmc-charts").bounding_box()
    first, second = (page.locator(CHART).nth(at).bounding_box() for at in (0, 1))
    assert row and first and second
    assert first["y"] == second["y"] and first["width"] + second["width"] > 0.95 * row["width"] - 26
    expect(page.locator(f"{CHART} .llmc-chart-note").nth(1)).to_have_text("up to 900 above")
    ends = page.locator(CHART).nth(1).locator(".llmc-name-tail")
    expect(ends).to_have_text("n_accuracy")
    page.locator(CARD).screenshot(path=pictures / "two-charts.png")
    cell = page.locator(".jp-Notebook .jp-Cell[data-windowed-list-index='1'] .cm-content")
    cell.focus()
    stop, toggle = page.get_by_role("button", name="Stop scales"), page.locator(f"{CHART} .llmc-log").nth(1)
    stop.focus()
    for _ in range(20):  # over the buttons, the charts' own settings and the first chart
        page.keyboard.press("Tab")
        if toggle.evaluate("(element) => element === document.activeElement"):
            break
    expect(toggle).to_be_focused()
    page.keyboard.press("Escape")
    expect(cell).to_be_focused()
    toggle.focus()
    page.keyboard.press("Enter")
    browser.wait_for_cell(page, 1)
    saved = page.evaluate(SAVED_HTML)
    source = base64.b64decode(re.findall(r'base64,([^"]+)"', saved)[1]).decode()
    assert "log scale" in source and "up to 900" not in source
    page.screenshot(path=pictures / "two-charts-static.png")


def test_numbers_read_the_same_live_and_saved(page: Page) -> None:
    values = [
        0.00025,
        -0.00125,
        1_250_000,
        -123456,
        0,
        1,
        -3,
        12800,
        2.3412345,
        0.00031,
        3.1e-5,
        1.5e9,
        99.999,
        1234.5678,
        0.1,
        1e7,
        -0.05,
    ]
    durations = [0.0, 0.44, 9.9, 9.97, 47, 60, 72.4, 3600, 7512, 90000]
    told = page.evaluate(ASK_JAVASCRIPT, [LIVE_VIEW.read_text(encoding="utf-8"), values, durations])
    assert told[0] == [numerals.format_number(value) for value in values]
    assert told[1] == [numerals.format_duration(value) for value in durations]


def test_stop_goes_through_the_kernel_where_the_server_has_no_route(opened: Opened) -> None:
    page = opened(FEED, IN_BACKGROUND, stop=lambda route: route.fulfill(status=404, body="no such route"))
    browser.run_cell(page, 0)
    browser.run_cell(page, 1)
    page.get_by_role("button", name="Stop in-background").click()
    expect(browser.output_of(page, 1)).to_contain_text("stopped after")
    expect(page.locator(CARD)).to_have_count(0)


def test_whatever_a_name_contains_is_shown_as_text(opened: Opened) -> None:
    page = opened(FEED, HOSTILE, HOSTILE_END, stop=lambda route: route.abort())
    for index in range(3):
        browser.run_cell(page, index)
        if index == 1:
            expect(page.locator(f"{CARD} .llmc-name")).to_have_text("<img src=x onerror=window.broken=1>")
            expect(page.locator(f"{CHART} .llmc-chart-name")).to_contain_text("<img")
    expect(browser.output_of(page, 1)).to_contain_text("ValueError: <img src=x")
    assert page.evaluate("() => window.broken") is None
