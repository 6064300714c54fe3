"""What a page shows of what goes on, in JupyterLab with a real cluster: actions, cells, notifications, cuts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, WebSocketRoute, expect

from tests.support.axe import look
from tests.support.browser import end_kernel, output_of, run_cell, start_cell, wait_for_cell, write_notebook
from tests.support.lab import Lab, open_lab, running_lab
from tests.support.recorded_runs import record_run
from tests.support.tiny_models import CHAT_TEMPLATE, save_tiny_llama

pytestmark = pytest.mark.browser

START_MS = 60_000
SIDEBAR = "#llmcloud-sidebar"
WORK, NOTES = "work.ipynb", "notes.ipynb"
TRAIN = """%%distribute -n 2 --name watched --checkpoint-every 1000
import pathlib, torch, time
from torch.nn.parallel import DistributedDataParallel
model = DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for step in run.steps(100_000):
    model(torch.randn(4, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    run.log(loss=1 / (step + 1), step=step)
    if step == 20:
        print("a line")
    time.sleep(0.02)
    if pathlib.Path("let-go").exists():
        break
"""
FAILS = "%%distribute --name broken\nimport time\ntime.sleep(3)\nraise RuntimeError('no more')"
CELLS = [
    "import jupyter_llmcloud as lc\n%load_ext jupyter_llmcloud", TRAIN, "%world", "%endpoints",
    "lc.endpoints.get('poet')", FAILS, "%cluster",
]  # fmt: skip


@pytest.fixture
def jp_asyncio_loop() -> None:
    """None of a test's own: the browser's runs in this thread."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    write_notebook(folder / WORK, CELLS)
    write_notebook(folder / NOTES, ["x = 1"])
    return folder


@pytest.fixture(scope="module")
def lab(folder: Path, module_root: Path) -> Iterator[Lab]:
    with running_lab(folder) as running:
        yield running


@pytest.fixture(scope="module")
def context(one_chromium: Browser) -> BrowserContext:
    """Pages of one user, whose clipboard can be read."""
    return one_chromium.new_context(permissions=["clipboard-read", "clipboard-write"])


@pytest.fixture(scope="module")
def sockets() -> list[WebSocketRoute]:
    """The websockets that the page has opened to our server, the newest last."""
    return []


@pytest.fixture(scope="module")
def page(context: BrowserContext, lab: Lab, sockets: list[WebSocketRoute], folder: Path) -> Iterator[Page]:
    """The notebook and the sidebar; its kernel and its cluster serve all tests of this module."""

    def open_socket(socket: WebSocketRoute) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    context.route_web_socket(re.compile("llmcloud/api/events"), open_socket)
    page = open_lab(context, lab, WORK)
    execute(page, "llmcloud:open-panel")
    run_cell(page, 0)
    yield page
    (folder / "let-go").touch()
    show(page, WORK)
    end_kernel(page)
    headers = {"Authorization": f"token {lab.token}"}
    for cluster in context.request.get(f"{lab.url}llmcloud/api/clusters", headers=headers).json()["clusters"]:
        assert context.request.delete(f"{lab.url}llmcloud/api/clusters/{cluster['name']}", headers=headers).ok


def execute(page: Page, command: str, **args: Any) -> None:
    script = "async ([command, args]) => { await window.jupyterapp.commands.execute(command, args); }"
    page.evaluate(script, [command, args])


def show(page: Page, notebook: str) -> None:
    execute(page, "docmanager:open", path=notebook)
    page.wait_for_function("name => window.jupyterapp.shell.currentWidget.title.label === name", arg=notebook)


def source_of_active_cell(page: Page) -> str:
    script = "() => window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.getSource()"
    return str(page.evaluate(script))


def row_of(page: Page, name: str) -> Locator:
    return page.locator(f"{SIDEBAR} .llmc-runrow").filter(has_text=name).first


def test_a_run_is_saved_watched_through_a_cut_and_its_end_is_told_elsewhere(
    page: Page, sockets: list[WebSocketRoute], folder: Path, pictures: Path
) -> None:
    start_cell(page, 1)
    card = output_of(page, 1).locator(".llmc-run")
    plot = card.locator('[data-metric="loss"] .llmc-plot')
    expect(card.locator(".llmc-phases")).to_contain_text("starting", timeout=START_MS)
    card.screenshot(path=pictures / "run-phases.png")
    expect(plot).to_be_visible(timeout=START_MS)
    card.get_by_role("button", name="Checkpoint").click()
    expect(card).to_contain_text(re.compile(r"A checkpoint of step \d+ is saved"), timeout=START_MS)
    expect(card.locator("summary", has_text="Events")).to_be_visible(timeout=START_MS)
    with page.expect_popup() as popup:
        card.get_by_role("link", name="Log").click()
    expect(popup.value.locator("body")).to_contain_text("a line")
    popup.value.close()
    look(page, pictures, "run-in-cell", ".llmc-run")
    seen = float(plot.get_attribute("data-to") or 0)
    sockets[-1].close(code=1011, reason="cut by the test")
    page.wait_for_function(
        "seen => Number(document.querySelector('[data-metric=loss] .llmc-plot')?.dataset.to) > seen + 5", arg=seen
    )
    expect(card).not_to_contain_text("is cut")
    show(page, NOTES)
    (folder / "let-go").touch()
    toast = page.locator(".jp-toast-content, .Toastify__toast").filter(has_text="The run watched has finished")
    expect(toast.first).to_be_visible(timeout=START_MS)
    page.screenshot(path=pictures / "notification.png")
    toast.get_by_role("button", name="Show it").first.click()
    expect(page.locator(".llmc-Tab .llmc-run").filter(has_text="watched")).to_be_visible()
    show(page, WORK)
    wait_for_cell(page, 1)


def test_a_failure_is_told_until_it_is_read(page: Page) -> None:
    start_cell(page, 5)
    show(page, NOTES)
    toast = page.locator(".jp-toast-content, .Toastify__toast").filter(has_text="The run broken has failed")
    expect(toast.first).to_be_visible(timeout=START_MS)
    show(page, WORK)
    wait_for_cell(page, 5)


def test_the_ranks_and_the_cluster_are_panels_in_a_cell(page: Page, pictures: Path) -> None:
    ranks = run_cell(page, 2).locator("section[aria-label='Ranks']")
    expect(ranks.locator("tbody tr")).to_have_count(2)
    ranks.get_by_role("button", name="Variables").click()
    expect(ranks.get_by_role("region", name="Variables of rank 0")).to_contain_text("optimizer")
    ranks.scroll_into_view_if_needed()
    look(page, pictures, "world-in-cell", "section[aria-label='Ranks']")
    clusters = run_cell(page, 6).locator("section[aria-label='Clusters']")
    expect(clusters.get_by_role("list", name="Who holds its slots")).to_contain_text("2 slots")
    clusters.scroll_into_view_if_needed()
    look(page, pictures, "cluster-in-cell", ".jp-Notebook section[aria-label='Clusters']")


def test_the_meters_of_a_worker_fit_into_a_narrow_sidebar(page: Page, pictures: Path) -> None:
    execute(page, "llmcloud:open-panel")
    meters = page.locator(f"{SIDEBAR} .llmc-meter")
    expect(meters.first).to_be_visible()
    for meter in meters.all():
        assert meter.evaluate("meter => meter.scrollWidth <= meter.clientWidth"), meter.inner_text()
    section = page.locator(f"{SIDEBAR} section[aria-label='Clusters']")
    assert section.evaluate("section => section.scrollWidth <= section.clientWidth")
    page.locator(SIDEBAR).screenshot(path=pictures / "sidebar-narrow.png")


def test_stopping_a_cluster_says_first_what_is_lost(page: Page, pictures: Path) -> None:
    card = page.locator(f"{SIDEBAR} section[aria-label='Clusters'] article").first
    card.get_by_role("button", name="Stop", exact=True).click()
    question = card.get_by_role("alertdialog")
    expect(question).to_contain_text("2 ranks of notebooks/work.ipynb end with their variables")
    page.locator(SIDEBAR).screenshot(path=pictures / "cluster-stop.png")
    question.get_by_role("button", name="Keep it").click()


def test_cells_are_inserted_for_a_cluster_and_a_run(page: Page) -> None:
    row_of(page, "watched").get_by_role("button", name="watched").click()
    toolbar = page.locator(".jp-MainAreaWidget:not(.lm-mod-hidden) .jp-Toolbar")
    toolbar.get_by_role("button", name="Insert Cell: attach").click()
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.title.label === 'work.ipynb'")
    assert source_of_active_cell(page) == "%load_ext jupyter_llmcloud\n%runs attach watched"
    row_of(page, "watched").get_by_role("button", name="watched").click()
    toolbar.get_by_role("button", name="Insert Cell: resume").click()
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.title.label === 'work.ipynb'")
    source = source_of_active_cell(page)
    assert source.startswith("%%distribute --resume watched\nimport pathlib") and "run.steps" in source
    page.locator(f"{SIDEBAR} section[aria-label='Clusters'] article .llmc-link").first.click()
    toolbar.get_by_role("button", name="Insert Cell: use this cluster").click()
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.title.label === 'work.ipynb'")
    assert "%world start --cluster" in source_of_active_cell(page)
    for _ in range(3):
        execute(page, "notebook:delete-cell")


def test_the_model_of_a_run_is_served_by_a_button_and_its_card_is_copied_from(
    page: Page, context: BrowserContext, pictures: Path
) -> None:
    run = record_run(
        "poet-1", "poet", lambda _: [{"loss": 1.0 / (at + 1)} for at in range(20)], artifacts={"model": "model"}
    )
    save_tiny_llama(run.model, chat_template=CHAT_TEMPLATE)
    execute(page, "llmcloud:open-run", id="poet-1", name="poet")
    card = page.locator(".jp-MainAreaWidget:not(.lm-mod-hidden) .llmc-Tab .llmc-run")
    card.get_by_role("button", name="Serve").click()
    expect(card).to_contain_text("The endpoint poet is starting")
    endpoint = page.locator(SIDEBAR).get_by_role("article", name="Endpoint poet")
    expect(endpoint).to_contain_text("1 of 1 replicas ready", timeout=START_MS)
    show(page, WORK)
    table = run_cell(page, 3).locator("section[aria-label='Endpoints']")
    expect(table.get_by_role("article", name="Endpoint poet")).to_contain_text("ready")
    table.scroll_into_view_if_needed()
    look(page, pictures, "endpoints-in-cell", ".jp-Notebook section[aria-label='Endpoints']")
    whole = run_cell(page, 4).locator("section[aria-label='Endpoints']")
    for language, words in (("Python", "from openai import OpenAI"), ("JavaScript", "await fetch("), ("curl", "curl ")):
        whole.get_by_role("button", name=language, exact=True).click()
        whole.get_by_role("button", name=f"Copy {language}").click()
        expect(whole.get_by_role("button", name=f"Copy {language}")).to_have_text("Copied")
        assert words in str(page.evaluate("() => navigator.clipboard.readText()"))
    whole.scroll_into_view_if_needed()
    look(page, pictures, "endpoint-in-cell", ".jp-Notebook section[aria-label='Endpoints']")
    execute(page, "llmcloud:open-endpoint", id="poet", name="poet")
    toolbar = page.locator(".jp-MainAreaWidget:not(.lm-mod-hidden) .jp-Toolbar")
    toolbar.get_by_role("button", name="Insert Cell: Python client").click()
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.title.label === 'work.ipynb'")
    assert 'model="poet"' in source_of_active_cell(page)
    execute(page, "notebook:delete-cell")
    endpoint.get_by_role("button", name="Stop the endpoint poet").click()
    endpoint.get_by_role("button", name="Stop poet").click()
    expect(endpoint).to_contain_text("stopped", timeout=START_MS)


def test_a_cluster_that_is_gone_takes_its_ranks_with_it_in_every_panel(page: Page) -> None:
    card = page.locator(f"{SIDEBAR} section[aria-label='Clusters'] article").first
    card.get_by_role("button", name="Stop", exact=True).click()
    card.get_by_role("alertdialog").get_by_role("button", name=re.compile("^Stop ")).click()
    expect(page.locator(f"{SIDEBAR} section[aria-label='Clusters']")).to_contain_text(
        "There is no cluster", timeout=START_MS
    )
    expect(output_of(page, 2)).to_contain_text("This world has ended", timeout=START_MS)
    expect(output_of(page, 6)).to_contain_text("There is no cluster")
