"""What a page takes to draw: a run of a million points that is panned and zoomed, and one that logs very fast.

In JupyterLab and headless Chromium, with a real mouse. The cost of a step is the processor time of the page's main
thread (scripting, style, layout, painting) from the move of the mouse until the frame is drawn, as Chromium counts it, so
it does not depend on what else the machine does. The frames of the busy run are counted as they come.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from playwright.sync_api import CDPSession, Page

from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.bench.measured import Row
from tests.bench.shell import REPOSITORY
from tests.support.lab import browser_path, open_lab, running_browser, running_lab

NUM_RANKS, STEPS = 8, 125_000  # a million points
NUM_MOVES = 60
FEED_RANKS, FEED_PER_S, FEED_S = 16, 1000, 20.0
PATIENCE_MS = 120_000
PLOT = '.llmc-Tab [data-metric="loss"] .llmc-plot'
# Resolves once the frame that follows has been drawn.
DRAWN = """() => new Promise(resolve => requestAnimationFrame(() => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve;
    port2.postMessage(0);
}))"""
COUNT = """() => {
    const frames = window.llmcFrames = [];
    let before = performance.now();
    const next = now => { frames.push(now - before); before = now; requestAnimationFrame(next); };
    requestAnimationFrame(next);
}"""


def measure(folder: Path) -> list[Row]:
    """A minute or two; without a browser the rows say so."""
    path = browser_path()
    what = f"{NUM_RANKS * STEPS:,} points of {NUM_RANKS} ranks"
    if path is None:
        return [Row("panels", f"{what}: pan and zoom", "ms", "", [], missing="there is no Chromium")]
    (folder / "notebooks").mkdir(parents=True)
    with _own_folders(folder):
        _record_million()
        with running_lab(folder / "notebooks") as lab, running_browser(path) as browser:
            page = open_lab(browser, lab)
            pan, zoom = _million(page)
            gaps = _busy(page, folder)
    fed = f"{FEED_RANKS} ranks with {FEED_PER_S:,} points/s"
    return [
        Row("panels", f"{what}: processor time of a frame while panning, p95", "ms", "", pan, limit=16, percent=95),
        Row("panels", f"{what}: processor time of a frame while zooming, p95", "ms", "", zoom, limit=16, percent=95),
        Row("panels", f"{fed}: from one frame to the next, p95", "ms", "", gaps, limit=1000 / 30, percent=95),
        Row("panels", f"{fed}: frames a second", "", "", [1000 * len(gaps) / sum(gaps)]),
    ]


@contextmanager
def _own_folders(folder: Path) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(LLMCLOUD_ROOT=str(folder / "root"), LLMCLOUD_RUNTIME_DIR=str(folder / "run"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _record_million() -> None:
    """A run on disk, written as its ranks would have."""
    now = time.time()
    ranks = list(range(NUM_RANKS))
    run = RunStore().folder("million-1")
    run.create(RunRecord("million-1", "million", "finished", now - 600, now, ranks, NUM_RANKS, cluster="local"), "")
    for rank in ranks:
        path = run.metrics(rank)
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for step in range(STEPS):
                loss = 1 / (step / 5000 + 1) + (step * 7919 + rank * 104_729) % 1000 / 5000
                record = {"seq": step + 1, "t": now - 600 + step * 600 / STEPS, "step": step, "values": {"loss": loss}}
                file.write(json.dumps(record) + "\n")


def _million(page: Page) -> tuple[list[float], list[float]]:
    """(what frames cost while the run is panned, while it is zoomed)."""
    _open_run(page, "million-1")
    page.wait_for_function(
        "([plot, steps]) => Number(document.querySelector(plot)?.dataset.to) > 0.99 * steps",
        arg=[PLOT, STEPS],
        timeout=PATIENCE_MS,
    )
    over = page.locator(f"{PLOT} .u-over")
    box = over.bounding_box()
    assert box
    x, y, width = box["x"], box["y"] + box["height"] / 2, box["width"]
    cost = _cost_of(page)
    page.keyboard.down("Control")
    page.mouse.move(x + width / 2, y)
    zoom = [cost(lambda at=at: page.mouse.wheel(0, -100 if at % 20 < 10 else 100)) for at in range(NUM_MOVES)]
    for _ in range(8):
        page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    page.keyboard.down("Shift")
    page.mouse.down()
    pan = [cost(lambda at=at: page.mouse.move(x + width / 2 + 3 * (at % 30), y)) for at in range(NUM_MOVES)]
    page.mouse.up()
    page.keyboard.up("Shift")
    return pan, zoom


def _open_run(page: Page, run_id: str) -> None:
    script = "async id => { await window.jupyterapp.commands.execute('llmcloud:open-run', { id }); }"
    page.evaluate(script, run_id)


def _cost_of(page: Page) -> Callable[[Callable[[], None]], float]:
    """What measures the milliseconds that the main thread computes until the frame after an action is drawn."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.setTimeDomain", {"timeDomain": "threadTicks"})
    session.send("Performance.enable")

    def taken(action: Callable[[], None]) -> float:
        before = _task_s(session)
        action()
        page.evaluate(DRAWN)
        return 1000 * (_task_s(session) - before)

    asking = median(
        taken(lambda: None) for _ in range(20)
    )  # what it takes to be asked for a frame that shows nothing new
    return lambda action: max(0.0, taken(action) - asking)


def _task_s(session: CDPSession) -> float:
    metrics = {row["name"]: row["value"] for row in session.send("Performance.getMetrics")["metrics"]}
    return float(metrics["TaskDuration"])


def _busy(page: Page, folder: Path) -> list[float]:
    """Milliseconds between the frames of a page that watches a run which logs very fast."""
    words = [str(folder), str(FEED_RANKS), str(FEED_PER_S), str(FEED_S)]
    feeder = subprocess.Popen([sys.executable, "-m", "tests.bench.bodies.feed_run", *words], cwd=REPOSITORY)
    try:
        while not (folder / "root" / "runs" / "fed-1" / "run.json").exists():
            time.sleep(0.05)
        page.evaluate("() => window.jupyterapp.shell.currentWidget.close()")
        _open_run(page, "fed-1")
        page.locator(PLOT).wait_for(timeout=PATIENCE_MS)
        page.evaluate(COUNT)
        page.locator(".llmc-Tab .llmc-state", has_text="finished").wait_for(timeout=PATIENCE_MS)
        gaps: list[float] = page.evaluate("() => window.llmcFrames")
        return gaps
    finally:
        feeder.wait(PATIENCE_MS / 1000)
