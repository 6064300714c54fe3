"""The extension in JupyterLab itself: status bar, menus, palette, launcher, toolbars, and what is said of its server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect

from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.browser import end_kernel, run_cell, write_notebook
from tests.support.lab import Lab, open_lab

pytestmark = pytest.mark.browser

STATUS = ".llmc-RunsStatus"
LIST = ".llmc-RunList"
SIDEBAR = "#llmcloud-sidebar"
STATUS_ROUTE = re.compile(r"/llmcloud/api/status")
CLOSE_SIDEBAR = "() => window.jupyterapp.shell.collapseLeft()"


@pytest.fixture(scope="module")
def lab_page(context: BrowserContext, lab: Lab) -> Iterator[Page]:
    """JupyterLab, for all tests of this module that change nothing in it."""
    page = open_lab(context, lab)
    yield page
    page.close()


@pytest.fixture
def page(lab_page: Page) -> Page:
    """The same, with its sidebar and its lists closed."""
    lab_page.evaluate(CLOSE_SIDEBAR)
    expect(lab_page.locator(SIDEBAR)).to_be_hidden()
    return lab_page


@pytest.fixture
def answers_otherwise(context: BrowserContext, lab: Lab) -> Iterator[Page]:
    """A page that is not open yet; its status route is answered by the test."""
    page = context.new_page()
    yield page
    page.close()


def open_panel(page: Page) -> Locator:
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    sidebar = page.locator(SIDEBAR)
    expect(sidebar).to_be_visible()
    return sidebar


def ended_run(run_id: str, name: str, state: str = "finished") -> None:
    """A run on disk that has ended."""
    record = RunRecord(run_id, name, state, created=time.time() - 10, ended=time.time(), world_size=2)
    RunStore().folder(run_id).create(record, "1 + 1")


def test_runs_on_disk_are_listed_over_the_status_bar_and_names_are_texts(page: Page, pictures: Path) -> None:
    name = "<img src=x onerror=window.broken=1>"
    ended_run("ended-1", "ended-run")
    ended_run("ended-2", name, "failed")
    page.locator(STATUS).click()
    rows = page.locator(f"{LIST} .llmc-runrow")
    expect(rows.filter(has_text="ended-run")).to_contain_text("finished")
    expect(rows.filter(has_text=name)).to_contain_text("failed")
    assert page.evaluate("() => window.broken") is None
    page.screenshot(path=pictures / "status-bar-runs.png")
    page.keyboard.press("Escape")
    expect(page.locator(LIST)).to_have_count(0)


def test_runs_are_searched_and_filtered_by_state(page: Page) -> None:
    ended_run("search-1", "sought-poet")
    ended_run("search-2", "sought-poet-again", "failed")
    ended_run("search-3", "sought-painter")
    sidebar = open_panel(page)
    rows = sidebar.locator(".llmc-runrow")
    expect(rows.filter(has_text="sought-painter")).to_have_count(1)
    sidebar.get_by_label("Search runs").fill("sought-poet")
    expect(rows).to_have_count(2)
    sidebar.get_by_label("Filter by state").select_option(label="Failed or stopped")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("sought-poet-again")
    sidebar.get_by_label("Filter by state").select_option(label="All")
    sidebar.get_by_label("Search runs").fill("")


def test_the_panel_is_in_the_view_menu(page: Page, pictures: Path) -> None:
    page.get_by_role("menuitem", name="View", exact=True).click()
    entry = page.locator(".lm-Menu-item[data-command='llmcloud:open-panel']")
    expect(entry).to_contain_text("Clusters, Runs and Endpoints")
    page.screenshot(path=pictures / "menu-view.png")
    entry.click()
    expect(page.locator(SIDEBAR)).to_be_visible()


@pytest.mark.parametrize(
    ("words", "command", "opens"),
    [
        ("Clusters, Runs and Endpoints", "llmcloud:open-panel", SIDEBAR),
        ("Show Runs", "llmcloud:show-runs", LIST),
    ],
)
def test_commands_are_found_in_the_palette_and_run_from_there(
    page: Page, pictures: Path, words: str, command: str, opens: str
) -> None:
    page.keyboard.press("Control+Shift+c")
    palette = page.locator("#command-palette")
    palette.locator("input").fill("llmcloud")
    expect(palette.locator("[data-command^='llmcloud:']")).not_to_have_count(0)
    page.screenshot(path=pictures / "palette.png")
    palette.locator("input").fill(words)
    palette.locator(f"[data-command='{command}']").click()
    expect(page.locator(opens)).to_be_visible()
    page.keyboard.press("Escape")


def test_the_launcher_has_a_card_that_opens_the_panel(page: Page, pictures: Path) -> None:
    page.evaluate("async () => { await window.jupyterapp.commands.execute('launcher:create'); }")
    card = page.locator(".jp-LauncherCard:visible").filter(has_text="Clusters and Runs").first
    card.scroll_into_view_if_needed()
    page.screenshot(path=pictures / "launcher.png")
    expect(card.locator("svg")).to_be_visible()
    card.focus()
    page.keyboard.press("Enter")
    expect(page.locator(SIDEBAR)).to_be_visible()


def test_the_icon_of_the_sidebar_opens_and_closes_it(page: Page) -> None:
    icon = page.locator(".jp-SideBar .lm-TabBar-tab[data-id='llmcloud-sidebar']")
    expect(icon).to_have_attribute("title", re.compile("^Clusters, runs and endpoints"))
    icon.click()
    expect(page.locator(SIDEBAR)).to_be_visible()
    icon.click()
    expect(page.locator(SIDEBAR)).to_be_hidden()


def test_a_cell_is_distributed_by_its_button_and_comes_back(
    context: BrowserContext, lab: Lab, notebooks: Path, pictures: Path
) -> None:
    write_notebook(notebooks / "cells.ipynb", ["x = 1\nprint(x)"])
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
    page.keyboard.press("Control+Shift+c")
    page.locator("#command-palette input").fill("Distribute This Cell")
    page.locator("#command-palette [data-command='llmcloud:distribute-cell']").click()
    page.wait_for_function(f"() => ({source})().startsWith('%%distribute')")
    end_kernel(page)
    page.close()


def test_a_server_of_another_version_is_said(answers_otherwise: Page, context: BrowserContext, lab: Lab) -> None:
    def answer(route: Route) -> None:
        route.fulfill(json={"version": "99.0", "pid": 1, "headless": False, "root": "/"})

    answers_otherwise.route(STATUS_ROUTE, answer)
    page = open_lab(context, lab, page=answers_otherwise)
    expect(open_panel(page).get_by_role("alert").first).to_contain_text("is version 99.0")


def test_a_server_without_the_extension_is_explained(
    answers_otherwise: Page, context: BrowserContext, lab: Lab, pictures: Path
) -> None:
    # As a Jupyter server answers on a path that it does not know: test_server_access.py asks one.
    answers_otherwise.route(STATUS_ROUTE, lambda route: route.fulfill(status=404, body="<!DOCTYPE HTML>"))
    page = open_lab(context, lab, page=answers_otherwise)
    expect(page.locator(STATUS)).to_have_text("runs: not enabled")
    expect(open_panel(page).get_by_role("alert").first).to_contain_text("jupyter server extension list")
    page.screenshot(path=pictures / "status-bar-not-enabled.png")


def test_a_panel_in_a_cell_is_live_and_its_table_is_in_the_saved_notebook(
    context: BrowserContext, lab: Lab, notebooks: Path, pictures: Path
) -> None:
    write_notebook(notebooks / "panel.ipynb", ["import jupyter_llmcloud as lc\nlc.ClusterPanel()"])
    page = open_lab(context, lab, "panel.ipynb")
    panel = run_cell(page, 0).locator("section[aria-label='Clusters']")
    names = [cluster["name"] for cluster in lab.ask("GET", "clusters")["clusters"]]
    for words in [f"Cluster {name}" for name in names]:
        expect(panel.get_by_role("article", name=words)).to_be_visible()
    if not names:
        expect(panel).to_contain_text("There is no cluster yet")
    expect(panel.get_by_role("button", name="New cluster")).to_be_visible()
    page.screenshot(path=pictures / "panel-in-cell.png")
    data = page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells[0].outputs.map(row => row.data)"
    )
    for words in names or ["There is no cluster yet"]:
        assert words in str(data[-1]["text/html"])
    end_kernel(page)
    page.close()
