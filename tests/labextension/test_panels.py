"""The panels in JupyterLab against a real server and a real cluster: started, scaled, watched and ended by mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.support.browser import DARK, LIGHT, set_theme, start_cell, write_notebook
from tests.support.lab import Lab, open_lab, running_lab

pytestmark = pytest.mark.browser

STATUS = ".llmc-RunsStatus"
SIDEBAR = "#llmcloud-sidebar"
START_MS = 60_000
RUN = """%%distribute --nproc 2 --name painted
import time
for step in run.progress(range(400)):
    run.log(loss=1 / (step + 1))
    time.sleep(0.02)
"""


@pytest.fixture
def jp_asyncio_loop() -> None:
    """None of a test's own: the browser's runs in this thread."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab under a base URL with a space, as JupyterHub gives it to a user of such a name."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    write_notebook(folder / "train.ipynb", ["%load_ext jupyter_llmcloud", RUN])
    with running_lab(folder, {"ServerApp": {"base_url": "/user/ann%20lee/"}}) as running:
        yield running


@pytest.fixture(scope="module")
def context(one_chromium: Browser) -> BrowserContext:
    """Pages of one user: what JupyterLab consists of is loaded once."""
    return one_chromium.new_context()


@pytest.fixture
def page(context: BrowserContext, lab: Lab) -> Iterator[Page]:
    """JupyterLab with the sidebar open."""
    page = open_lab(context, lab)
    open_sidebar(page)
    yield page
    page.close()


def open_sidebar(page: Page) -> None:
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    expect(page.locator(SIDEBAR)).to_be_visible()


def section(page: Page, name: str) -> Locator:
    return page.locator(SIDEBAR).get_by_role("region", name=name, exact=True).last


def test_a_cluster_is_started_scaled_and_stopped_by_mouse(page: Page, pictures: Path) -> None:
    clusters = page.locator(f"{SIDEBAR} section[aria-label='Clusters']")
    expect(clusters).to_contain_text("There is no cluster yet")
    clusters.get_by_role("button", name="New cluster").click()
    form = clusters.get_by_role("form", name="New cluster")
    expect(form.locator("option", has_text="slurm")).to_contain_text("not installed")
    form.get_by_label("Workers").fill("2")
    form.get_by_label("Name").fill("by-mouse")
    page.screenshot(path=pictures / "panels-new-cluster.png")
    form.get_by_role("button", name="Start cluster").click()
    expect(form.get_by_role("status")).to_contain_text("Starting for")
    card = clusters.get_by_role("article", name="Cluster by-mouse")
    expect(card).to_contain_text("2 workers", timeout=START_MS)
    expect(card).to_contain_text("running")
    card.get_by_label("Number of workers of by-mouse").fill("1")
    card.get_by_role("button", name="Scale", exact=True).click()
    expect(card).to_contain_text("1 worker ·", timeout=START_MS)
    page.screenshot(path=pictures / "panels-cluster.png")
    card.get_by_role("button", name="Stop", exact=True).click()
    question = card.get_by_role("alertdialog")
    expect(question).to_contain_text("Nothing runs on it.")
    page.keyboard.press("Escape")
    expect(question).to_have_count(0)
    card.get_by_role("button", name="Stop", exact=True).click()
    question.get_by_role("button", name="Stop by-mouse").click()
    expect(card).to_have_count(0, timeout=START_MS)


def test_a_run_begins_and_ends_in_the_sidebar_and_its_tab_is_there_after_a_reload(
    context: BrowserContext, lab: Lab, pictures: Path
) -> None:
    page = open_lab(context, lab, "train.ipynb")
    open_sidebar(page)
    expect(page.locator(STATUS)).to_have_text("no runs")
    start_cell(page, 0)
    start_cell(page, 1)
    row = page.locator(f"{SIDEBAR} .llmc-run").filter(has_text="painted")
    expect(row).to_contain_text("running", timeout=START_MS)
    expect(page.locator(STATUS)).to_have_text("1 run")
    row.get_by_role("button", name="painted", exact=True).click()
    tab = page.locator(".llmc-Tab .llmc-card").filter(has_text="painted")
    expect(tab).to_be_visible()
    page.screenshot(path=pictures / "panels-run-tab.png")
    # Its state is saved a moment after it changed, and not only when the page is left.
    page.wait_for_function(
        """async () => {
            const found = await fetch(document.location.origin + window.jupyterapp.serviceManager.serverSettings.baseUrl
                .replace(document.location.origin, '') + 'api/workspaces/default').then(answer => answer.text());
            return found.includes('llmcloud-run');
        }"""
    )
    page.goto(re.sub(r"[&?]reset", "", page.url))
    page.wait_for_function("() => window.jupyterapp !== undefined")
    page.evaluate("async () => { await window.jupyterapp.restored; }")
    expect(page.locator(".lm-TabBar-tabLabel", has_text="painted").first).to_be_visible()
    expect(page.locator(".llmc-Tab .llmc-card").filter(has_text="painted")).to_be_visible()
    row = page.locator(f"{SIDEBAR} .llmc-run").filter(has_text="painted")
    expect(row).to_contain_text("finished", timeout=START_MS)
    expect(page.locator(STATUS)).to_have_text("no runs")
    for theme, name in ((LIGHT, "light"), (DARK, "dark")):
        set_theme(page, theme)
        page.screenshot(path=pictures / f"panels-{name}.png")
    page.close()
