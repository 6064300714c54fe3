"""What pages show of what goes on, with a real cluster: actions, cells, notifications, cuts, a second browser."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, WebSocketRoute, expect

from tests.support.axe import look
from tests.support.browser import (
    end_kernel,
    output_of,
    run_cell,
    show_cell,
    start_cell,
    wait_for_cell,
    write_notebook,
)
from tests.support.keyboard import unreachable
from tests.support.lab import Lab, open_lab
from tests.support.recorded_runs import record_run
from tests.support.tiny_models import CHAT_TEMPLATE, save_tiny_llama
from tests.support.worlds import until

pytestmark = pytest.mark.browser

START_MS = 180_000
STATUS = ".llmc-RunsStatus"
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
    ends = torch.tensor(float(pathlib.Path("let-go").exists()))
    torch.distributed.broadcast(ends, 0)  # else one rank sees it a step later, and waits in backward for ever
    if ends:
        break
"""
FAILS = """%%distribute --name broken
import pathlib, time
while not pathlib.Path("let-go").exists():
    time.sleep(0.02)
raise RuntimeError("no more")
"""
LOAD, WATCHED, WORLD, ENDPOINTS, ENDPOINT, BROKEN, CLUSTER = range(7)
CELLS = {
    LOAD: "import jupyter_llmcloud as lc\n%load_ext jupyter_llmcloud",
    WATCHED: TRAIN,
    WORLD: "%world",
    ENDPOINTS: "%endpoints",
    ENDPOINT: "lc.endpoints.get('poet')",
    BROKEN: FAILS,
    CLUSTER: "%cluster",
}
EVENTS = re.compile("llmcloud/api/events$|llmcloud/api/events\\?")
LET_GO = "let-go"
CURRENT = "name => window.jupyterapp.shell.currentWidget.title.label === name"


@pytest.fixture(scope="module")
def sockets() -> list[WebSocketRoute]:
    """The websockets that the page has opened to our server, the newest last."""
    return []


@pytest.fixture(scope="module")
def page(context: BrowserContext, lab: Lab, sockets: list[WebSocketRoute], notebooks: Path) -> Iterator[Page]:
    """The notebook and the sidebar; its kernel and its cluster serve all tests of this module."""
    lab.end_clusters()
    write_notebook(notebooks / WORK, list(CELLS.values()))
    write_notebook(notebooks / NOTES, ["x = 1"])

    def open_socket(socket: WebSocketRoute) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    page = context.new_page()
    page.route_web_socket(EVENTS, open_socket)
    open_lab(context, lab, WORK, page=page)
    execute(page, "llmcloud:open-panel")
    run_cell(page, LOAD)
    yield page
    (notebooks / LET_GO).touch()
    show(page, WORK)
    end_kernel(page)
    page.close()
    lab.end_clusters()


@pytest.fixture
def trains(page: Page, notebooks: Path, lab: Lab) -> Iterator[Locator]:
    """The card of a run that trains in the notebook until the test ends; it is the only one that is active."""
    end_run(page, notebooks, lab)
    (notebooks / LET_GO).unlink(missing_ok=True)
    start_cell(page, WATCHED)
    card = output_of(page, WATCHED).locator(".llmc-run")
    expect(card).to_be_visible(timeout=START_MS)
    yield card
    end_run(page, notebooks, lab)


@pytest.fixture
def trained(page: Page, notebooks: Path, lab: Lab) -> None:
    """There is a run named watched that has ended, and its ranks are there."""
    show(page, WORK)
    worlds = [world["state"] for world in lab.ask("GET", "worlds")["worlds"]]
    if not worlds or not any(run["name"] == "watched" for run in lab.ask("GET", "runs")["runs"]):
        (notebooks / LET_GO).touch()
        run_cell(page, WATCHED, START_MS / 1000)


def end_run(page: Page, notebooks: Path, lab: Lab) -> None:
    """Let the run end, if there is one; its notebook is in view then."""
    (notebooks / LET_GO).touch()
    until(lambda: not lab.ask("GET", "runs?state=active")["runs"], "the run has ended", START_MS / 1000)
    show(page, WORK)
    page.wait_for_function(
        "index => window.jupyterapp.shell.currentWidget.content.widgets[index].model.executionState === 'idle'",
        arg=WATCHED,
    )


def execute(page: Page, command: str, **args: Any) -> None:
    script = "async ([command, args]) => { await window.jupyterapp.commands.execute(command, args); }"
    page.evaluate(script, [command, args])


def show(page: Page, notebook: str) -> None:
    execute(page, "docmanager:open", path=notebook)
    page.wait_for_function(CURRENT, arg=notebook)


def source_of_active_cell(page: Page) -> str:
    script = "() => window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.getSource()"
    return str(page.evaluate(script))


def sidebar_part(page: Page, name: str) -> Locator:
    execute(page, "llmcloud:open-panel")
    return page.locator(f"{SIDEBAR} section[aria-label='{name}']")


def row_of(page: Page, name: str) -> Locator:
    return sidebar_part(page, "Runs").locator(".llmc-runrow").filter(has_text=name).first


def cluster_card(page: Page) -> Locator:
    """Of the cluster that the notebook's first cell has started."""
    return sidebar_part(page, "Clusters").get_by_role("article", name="Cluster local")


def steps_seen(card: Locator) -> float:
    return float(card.locator('[data-metric="loss"] .llmc-plot').get_attribute("data-to") or 0)


def wait_for_more(page: Page, card: Locator) -> None:
    """Until its chart has grown."""
    seen = steps_seen(card)
    deadline = time.monotonic() + START_MS / 1000
    while steps_seen(card) <= seen + 5:
        assert time.monotonic() < deadline, f"the chart does not go on after step {seen}"
        page.wait_for_timeout(100)


TAB = ".jp-MainAreaWidget:not(.lm-mod-hidden) .llmc-Tab"
TOOLBAR = ".jp-MainAreaWidget:not(.lm-mod-hidden) .jp-Toolbar"


@pytest.mark.story
def test_a_run_is_saved_watched_through_a_cut_and_its_end_is_told_elsewhere(
    page: Page, trains: Locator, sockets: list[WebSocketRoute], notebooks: Path, pictures: Path
) -> None:
    card = trains
    expect(card.locator(".llmc-phases")).to_be_visible()
    card.screenshot(path=pictures / "run-phases.png")
    expect(card.locator('[data-metric="loss"] .llmc-plot')).to_be_visible(timeout=START_MS)
    expect(page.locator(STATUS)).to_have_text("1 run")
    card.get_by_role("button", name="Checkpoint").click()
    expect(card).to_contain_text(re.compile(r"A checkpoint of step \d+ is saved"), timeout=START_MS)
    expect(card.locator("summary", has_text="Events")).to_be_visible(timeout=START_MS)
    with page.expect_popup() as popup:
        card.get_by_role("link", name="Log").click()
    expect(popup.value.locator("body")).to_contain_text("a line")
    popup.value.close()
    look(page, pictures, "run-in-cell", ".llmc-run")
    sockets[-1].close(code=1011, reason="cut by the test")
    wait_for_more(page, card)
    expect(card).not_to_contain_text("is cut")
    show(page, NOTES)
    (notebooks / LET_GO).touch()
    toast = page.locator(".jp-toast-content, .Toastify__toast").filter(has_text="The run watched has finished")
    expect(toast.first).to_be_visible(timeout=START_MS)
    page.screenshot(path=pictures / "notification.png")
    toast.get_by_role("button", name="Show it").first.click()
    expect(page.locator(f"{TAB} .llmc-run").filter(has_text="watched")).to_be_visible()
    expect(page.locator(STATUS)).to_have_text("no runs")


@pytest.mark.soak
def test_two_browsers_see_one_run_and_it_is_stopped_from_its_tab_in_the_second(
    page: Page, trains: Locator, browser: Browser, lab: Lab, pictures: Path
) -> None:
    """In the second one no websocket comes through, as behind some proxies."""
    expect(trains.locator('[data-metric="loss"] .llmc-plot')).to_be_visible(timeout=START_MS)
    other = browser.new_context().new_page()
    other.route_web_socket(EVENTS, lambda socket: socket.close())
    open_lab(other.context, lab, page=other)
    row_of(other, "watched").get_by_role("button", name="watched", exact=True).click()
    tab = other.locator(f"{TAB} .llmc-run").filter(has_text="watched")
    expect(tab.locator('[data-metric="loss"] .llmc-plot')).to_be_visible(timeout=START_MS)
    assert float(tab.locator('[data-metric="loss"] .llmc-plot').get_attribute("data-from") or 99) < 5
    wait_for_more(other, tab)
    wait_for_more(page, trains)
    expect(other.locator(STATUS)).to_have_text("1 run")
    tab.get_by_role("button", name="Stop watched").click()
    expect(tab.locator(".llmc-state")).to_have_text("stopped", timeout=START_MS)
    expect(trains.locator(".llmc-state")).to_have_text("stopped", timeout=START_MS)
    wait_for_cell(page, WATCHED)
    expect(other.locator(STATUS)).to_have_text("no runs")
    expect(row_of(page, "watched")).to_contain_text("stopped")
    other.screenshot(path=pictures / "second-browser.png")
    other.context.close()


def test_a_failure_is_told_until_it_is_read(page: Page, trained: None, notebooks: Path) -> None:
    (notebooks / LET_GO).unlink(missing_ok=True)
    start_cell(page, BROKEN)
    expect(row_of(page, "broken")).to_contain_text("running", timeout=START_MS)
    show(page, NOTES)
    (notebooks / LET_GO).touch()
    toast = page.locator(".jp-toast-content, .Toastify__toast").filter(has_text="The run broken has failed")
    expect(toast.first).to_be_visible(timeout=START_MS)
    toast.get_by_role("button", name="Hide notification").first.click()
    show(page, WORK)
    wait_for_cell(page, BROKEN)


def test_the_ranks_and_the_cluster_are_panels_in_a_cell(page: Page, trained: None, pictures: Path) -> None:
    run_cell(page, WORLD)
    ranks = show_cell(page, WORLD).locator("section[aria-label='Ranks']")
    expect(ranks.locator("tbody tr")).to_have_count(2)
    ranks.get_by_role("button", name="Variables").click()
    expect(ranks.get_by_role("region", name="Variables of rank 0")).to_contain_text("optimizer")
    ranks.scroll_into_view_if_needed()
    look(page, pictures, "world-in-cell", "section[aria-label='Ranks']")
    run_cell(page, CLUSTER)
    clusters = show_cell(page, CLUSTER).locator("section[aria-label='Clusters']")
    expect(clusters.get_by_role("list", name="Who holds its slots")).to_contain_text("2 slots")
    clusters.scroll_into_view_if_needed()
    look(page, pictures, "cluster-in-cell", ".jp-Notebook section[aria-label='Clusters']")


def test_the_meters_of_a_worker_fit_into_a_narrow_sidebar(page: Page, trained: None, pictures: Path) -> None:
    section = sidebar_part(page, "Clusters")
    meters = section.locator(".llmc-meter")
    expect(meters.first).to_be_visible()
    for meter in meters.all():
        assert meter.evaluate("meter => meter.scrollWidth <= meter.clientWidth"), meter.inner_text()
    assert section.evaluate("section => section.scrollWidth <= section.clientWidth")
    page.locator(SIDEBAR).screenshot(path=pictures / "sidebar-narrow.png")


def test_stopping_a_cluster_says_first_what_is_lost(page: Page, trained: None, pictures: Path) -> None:
    card = cluster_card(page)
    card.get_by_role("button", name="Stop", exact=True).click()
    question = card.get_by_role("alertdialog")
    expect(question).to_contain_text("2 ranks of notebooks/work.ipynb end with their variables")
    page.locator(SIDEBAR).screenshot(path=pictures / "cluster-stop.png")
    question.get_by_role("button", name="Keep it").click()
    expect(question).to_have_count(0)


def test_cells_are_inserted_for_a_cluster_and_a_run(page: Page, trained: None) -> None:
    toolbar = page.locator(TOOLBAR)
    row_of(page, "watched").get_by_role("button", name="watched").click()
    toolbar.get_by_role("button", name="Insert Cell: attach").click()
    page.wait_for_function(CURRENT, arg=WORK)
    assert source_of_active_cell(page) == "%load_ext jupyter_llmcloud\n%runs attach watched"
    execute(page, "notebook:delete-cell")
    row_of(page, "watched").get_by_role("button", name="watched").click()
    toolbar.get_by_role("button", name="Insert Cell: resume").click()
    page.wait_for_function(CURRENT, arg=WORK)
    source = source_of_active_cell(page)
    assert source.startswith("%%distribute --resume watched\nimport pathlib") and "run.steps" in source
    execute(page, "notebook:delete-cell")
    cluster_card(page).locator(".llmc-link").first.click()
    toolbar.get_by_role("button", name="Insert Cell: use this cluster").click()
    page.wait_for_function(CURRENT, arg=WORK)
    assert "%world start --cluster" in source_of_active_cell(page)
    execute(page, "notebook:delete-cell")


@pytest.fixture(scope="module")
def poet_run() -> None:
    """A run that has left a model."""
    run = record_run(
        "poet-1", "poet", lambda _: [{"loss": 1.0 / (at + 1)} for at in range(20)], artifacts={"model": "model"}
    )
    save_tiny_llama(run.model, chat_template=CHAT_TEMPLATE)


@pytest.fixture
def poet(page: Page, lab: Lab, poet_run: None) -> Locator:
    """The endpoint of a model that a run has left, served by the button of its tab; its card in the sidebar."""
    if not any(row["state"] == "ready" for row in lab.ask("GET", "endpoints")["endpoints"] if row["name"] == "poet"):
        execute(page, "llmcloud:open-run", id="poet-1", name="poet")
        card = page.locator(f"{TAB} .llmc-run")
        card.get_by_role("button", name="Serve").click()
        expect(card).to_contain_text("The endpoint poet is starting")
    endpoint = sidebar_part(page, "Endpoints").get_by_role("article", name="Endpoint poet")
    expect(endpoint).to_contain_text("1 of 1 replicas ready", timeout=START_MS)
    return endpoint


def test_an_endpoint_is_a_card_in_a_cell_that_is_copied_from(page: Page, poet: Locator, pictures: Path) -> None:
    show(page, WORK)
    run_cell(page, ENDPOINTS)
    table = show_cell(page, ENDPOINTS).locator("section[aria-label='Endpoints']")
    expect(table.get_by_role("article", name="Endpoint poet")).to_contain_text("ready")
    table.scroll_into_view_if_needed()
    look(page, pictures, "endpoints-in-cell", ".jp-Notebook section[aria-label='Endpoints']")
    run_cell(page, ENDPOINT)
    whole = show_cell(page, ENDPOINT).locator("section[aria-label='Endpoints']")
    for language, words in (("Python", "from openai import OpenAI"), ("JavaScript", "await fetch("), ("curl", "curl ")):
        whole.get_by_role("button", name=language, exact=True).click()
        copy = whole.get_by_role("button", name=f"Copy {language}")
        copy.click()
        expect(copy).to_have_text("Copied")
        assert words in str(page.evaluate("() => navigator.clipboard.readText()"))
    whole.scroll_into_view_if_needed()
    look(page, pictures, "endpoint-in-cell", ".jp-Notebook section[aria-label='Endpoints']")
    execute(page, "llmcloud:open-endpoint", id="poet", name="poet")
    page.locator(TOOLBAR).get_by_role("button", name="Insert Cell: Python client").click()
    page.wait_for_function(CURRENT, arg=WORK)
    assert 'model="poet"' in source_of_active_cell(page)
    execute(page, "notebook:delete-cell")


def test_an_endpoint_answers_in_its_playground_and_its_key_is_made_and_revoked(
    page: Page, context: BrowserContext, poet: Locator, lab: Lab, pictures: Path
) -> None:
    execute(page, "llmcloud:open-panel")
    poet.get_by_role("button", name="Playground of poet").click()
    panel = page.locator(f"{TAB} section[aria-label='Endpoints']")
    panel.get_by_text("Parameters").click()
    panel.get_by_label("max_tokens").fill("24")
    panel.get_by_label("What to ask poet").fill("Who are you?")
    page.keyboard.press("Enter")
    expect(panel.get_by_text("first token after")).to_be_visible(timeout=START_MS)
    answer = panel.locator(".llmc-message[data-role='assistant'] .llmc-message-text")
    assert answer.inner_text().strip()
    panel.get_by_label("What the key is for").fill("a test")
    panel.get_by_role("button", name="Create key").click()
    key = panel.locator(".llmc-secret code").inner_text()
    models = f"{lab.url}llmcloud/v1/models"
    assert context.request.get(models, headers={"Authorization": f"Bearer {key}"}).ok
    row = panel.locator(".llmc-key").filter(has_text="a test")
    look(page, pictures, "endpoint", ".llmc-Tab")
    assert unreachable(page, panel) == []
    row.get_by_role("button", name="Revoke the key").click()
    row.get_by_role("alertdialog").get_by_role("button", name="Revoke").click()
    expect(row).to_have_count(0)
    expect(panel.locator(".llmc-secret")).to_have_count(0)
    assert context.request.get(models, headers={"Authorization": f"Bearer {key}"}).status == 401


def test_all_of_the_sidebar_is_reached_by_keyboard(page: Page, trained: None, poet: Locator) -> None:
    execute(page, "llmcloud:open-panel")
    expect(poet).to_be_visible()
    assert unreachable(page, page.locator(SIDEBAR)) == []


def test_an_endpoint_is_stopped_in_the_sidebar(page: Page, poet: Locator) -> None:
    execute(page, "llmcloud:open-panel")
    poet.get_by_role("button", name="Stop the endpoint poet").click()
    poet.get_by_role("button", name="Stop poet").click()
    expect(poet).to_contain_text("stopped", timeout=START_MS)


def test_the_ranks_of_a_notebook_are_looked_at_and_their_slots_released(
    page: Page, trained: None, lab: Lab, pictures: Path
) -> None:
    holder = cluster_card(page).get_by_role("list", name="Who holds its slots").locator("li").filter(has_text=WORK)
    holder.get_by_role("button", name="Ranks").click()
    ranks = page.locator(f"{TAB} section[aria-label='Ranks']")
    ranks.get_by_role("button", name="Variables").click()
    expect(ranks.get_by_role("region", name="Variables of rank 0")).to_contain_text("step")
    ranks.get_by_role("button", name="What are they doing now?").click()
    expect(ranks.get_by_label("Stacks")).to_contain_text("rank", ignore_case=True)
    assert unreachable(page, ranks) == []
    look(page, pictures, "ranks", ".llmc-Tab")
    holder.get_by_role("button", name="Release").first.click()
    expect(holder.get_by_role("alertdialog")).to_contain_text("their variables are lost")
    holder.get_by_role("alertdialog").get_by_role("button", name="Release").click()
    expect(holder).to_have_count(0)
    expect(ranks).to_contain_text("This world has ended")
    # The page says so before the agent has let go of it: the next test would take it for one that is there.
    until(lambda: not lab.ask("GET", "worlds")["worlds"], "the world has ended")


def test_a_cluster_that_is_gone_takes_its_ranks_with_it_in_every_panel(page: Page, trained: None, lab: Lab) -> None:
    lab.end_endpoints()  # a replica that has lost its cluster starts it again, under the same name
    show(page, WORK)
    for cell in (WORLD, CLUSTER):
        run_cell(page, cell)
    card = cluster_card(page)
    card.get_by_role("button", name="Stop", exact=True).click()
    card.get_by_role("alertdialog").get_by_role("button", name=re.compile("^Stop ")).click()
    expect(card).to_have_count(0, timeout=START_MS)
    expect(show_cell(page, WORLD)).to_contain_text("This world has ended", timeout=START_MS)
    expect(show_cell(page, CLUSTER).get_by_role("article", name="Cluster local")).to_have_count(0)
