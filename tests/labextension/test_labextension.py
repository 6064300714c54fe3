"""The runs in JupyterLab's status bar: counted, listed, and explained where they cannot be shown; cells distributed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.browser import end_kernel, run_cell, write_notebook
from tests.support.lab import Lab, open_lab, running_lab

pytestmark = pytest.mark.browser

STATUS = ".llmc-RunsStatus"
LIST = ".llmc-RunList"
SIDEBAR = "#llmcloud-sidebar"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One JupyterLab for this module, with the extension as installing the package enables it."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    write_notebook(folder / "cells.ipynb", ["x = 1\nprint(x)"])
    write_notebook(folder / "panel.ipynb", ["import jupyter_llmcloud as lc\nlc.ClusterPanel()"])
    with running_lab(folder) as running:
        yield running


@pytest.fixture
def jp_asyncio_loop() -> None:
    """None of a test's own: the browser's runs in this thread."""


@pytest.fixture(scope="module")
def context(one_chromium: Browser) -> BrowserContext:
    """Pages of one user: what JupyterLab consists of is loaded once."""
    return one_chromium.new_context()


@pytest.fixture
def page(context: BrowserContext, lab: Lab) -> Iterator[Page]:
    """JupyterLab."""
    page = open_lab(context, lab)
    yield page
    page.close()
    context.unroute_all()


def ended_run(run_id: str, name: str, state: str = "finished") -> None:
    """A run on disk that has ended."""
    record = RunRecord(run_id, name, state, created=time.time() - 10, ended=time.time(), world_size=2)
    RunStore().folder(run_id).create(record, "1 + 1")


def test_runs_on_disk_are_counted_and_listed_and_names_are_texts(page: Page, pictures: Path) -> None:
    name = "<img src=x onerror=window.broken=1>"
    ended_run("ended-1", "ended-run")
    ended_run("ended-2", name, "failed")
    expect(page.locator(STATUS)).to_have_text("no runs")
    page.locator(STATUS).click()
    rows = page.locator(f"{LIST} .llmc-runrow")
    expect(rows.filter(has_text="ended-run")).to_contain_text("finished")
    expect(rows.filter(has_text=name)).to_contain_text("failed")
    assert page.evaluate("() => window.broken") is None
    page.screenshot(path=pictures / "status-bar-runs.png")
    page.keyboard.press("Escape")
    expect(page.locator(LIST)).to_have_count(0)


def test_runs_are_searched_and_filtered_by_state(page: Page) -> None:
    ended_run("search-1", "poet")
    ended_run("search-2", "poet-again", "failed")
    ended_run("search-3", "painter")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    rows = page.locator(f"{SIDEBAR} .llmc-runrow")
    expect(rows.filter(has_text="painter")).to_have_count(1)
    page.locator(SIDEBAR).get_by_label("Search runs").fill("poet")
    expect(rows).to_have_count(2)
    page.locator(SIDEBAR).get_by_label("Filter by state").select_option(label="Failed or stopped")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("poet-again")


def test_a_cell_is_distributed_by_its_button_and_comes_back(context: BrowserContext, lab: Lab, pictures: Path) -> None:
    page = open_lab(context, lab, "cells.ipynb")
    source = "() => window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.getSource()"
    button = page.locator(".jp-cell-toolbar [data-command='llmcloud:distribute-cell']")
    page.locator(".jp-CodeCell .cm-content").first.click()
    expect(button).to_be_visible()
    page.screenshot(path=pictures / "cell-toolbar.png")
    button.click()
    page.wait_for_function(f"() => ({source})() === '%%distribute\\nx = 1\\nprint(x)'")
    button.click()
    page.wait_for_function(f"() => ({source})() === 'x = 1\\nprint(x)'")
    page.close()


def test_a_server_of_another_version_is_said(context: BrowserContext, lab: Lab) -> None:
    def answer(route: Route) -> None:
        route.fulfill(json={"version": "99.0", "pid": 1, "headless": False, "root": "/"})

    context.route(re.compile(r"/llmcloud/api/status"), answer)
    page = open_lab(context, lab)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    expect(page.locator(SIDEBAR).get_by_role("alert").first).to_contain_text("is version 99.0")
    page.close()
    context.unroute_all()


def test_a_server_without_the_extension_is_explained(one_chromium: Browser, tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    off = {"ServerApp": {"jpserver_extensions": {"jupyter_llmcloud": False}}}
    with running_lab(folder, off) as without:
        page = open_lab(one_chromium, without)
        expect(page.locator(STATUS)).to_have_text("runs: not enabled")
        page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
        expect(page.locator(SIDEBAR).get_by_role("alert").first).to_contain_text("jupyter server extension list")
        page.screenshot(path=pictures / "status-bar-not-enabled.png")


def test_a_panel_in_a_cell_is_live_and_its_table_is_in_the_saved_notebook(
    context: BrowserContext, lab: Lab, pictures: Path
) -> None:
    page = open_lab(context, lab, "panel.ipynb")
    output = run_cell(page, 0)
    panel = output.locator("section[aria-label='Clusters']")
    expect(panel).to_contain_text("There is no cluster yet")
    expect(panel.get_by_role("button", name="New cluster")).to_be_visible()
    page.screenshot(path=pictures / "panel-in-cell.png")
    data = page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells[0].outputs.map(row => row.data)"
    )
    assert "There is no cluster yet" in str(data[-1]["text/html"])
    end_kernel(page)
    page.close()
