"""The panels in JupyterLab against a real server and a real cluster: started, scaled, watched and ended by mouse."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.support.axe import look
from tests.support.browser import start_cell, write_notebook
from tests.support.lab import Lab, open_lab, running_lab
from tests.support.tiny_models import CHAT_TEMPLATE, save_tiny_llama

pytestmark = pytest.mark.browser

STATUS = ".llmc-RunsStatus"
SIDEBAR = "#llmcloud-sidebar"
START_MS = 60_000
LAYOUT = """async () => {
    const { baseUrl } = window.jupyterapp.serviceManager.serverSettings;
    const saved = await fetch(`${baseUrl}lab/api/workspaces/default`).then(answer => answer.json());
    return JSON.stringify(saved.data["layout-restorer:data"]?.main ?? "");
}"""
ELSEWHERE = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""
RUN = """%%distribute --nproc 2 --name painted
import time
for step in range(600):
    run.log(loss=1 / (step + 1), step=step)
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
def alone(context: BrowserContext) -> Iterator[None]:
    """No page is left open: a second one of the same workspace would be given another."""
    yield
    for page in context.pages:
        page.close()


@pytest.fixture
def page(context: BrowserContext, lab: Lab, alone: None) -> Page:
    """JupyterLab with the sidebar open."""
    page = open_lab(context, lab)
    open_sidebar(page)
    return page


def open_sidebar(page: Page) -> None:
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    expect(page.locator(SIDEBAR)).to_be_visible()


def wait_until_saved(page: Page, tab: str) -> None:
    """The layout is saved a moment after it changed, and not only when the page is left."""
    deadline = time.monotonic() + START_MS / 1000
    while tab not in page.evaluate(LAYOUT):
        assert time.monotonic() < deadline, f"the layout was not saved with {tab}"
        page.wait_for_timeout(200)


def test_a_cluster_is_started_scaled_and_stopped_by_mouse(page: Page, pictures: Path) -> None:
    clusters = page.locator(f"{SIDEBAR} section[aria-label='Clusters']")
    expect(clusters).to_contain_text("There is no cluster yet")
    clusters.get_by_role("button", name="New cluster").click()
    form = clusters.get_by_role("form", name="New cluster")
    expect(form.locator("option", has_text="slurm")).to_contain_text("not installed")
    form.get_by_label("Workers").fill("2")
    form.get_by_label("Name").fill("by-mouse")
    look(page, pictures, "new-cluster", SIDEBAR)
    form.get_by_role("button", name="Start cluster").click()
    expect(form.get_by_role("status")).to_contain_text("Starting for")
    card = clusters.get_by_role("article", name="Cluster by-mouse")
    expect(card).to_contain_text("2 workers", timeout=START_MS)
    expect(card).to_contain_text("running")
    card.get_by_label("Number of workers of by-mouse").fill("1")
    card.get_by_role("button", name="Scale", exact=True).click()
    expect(card).to_contain_text("1 worker ·", timeout=START_MS)
    look(page, pictures, "cluster", SIDEBAR)
    card.get_by_role("button", name="adapt …").click()
    card.get_by_label("Fewest workers").fill("3")
    card.get_by_label("Most workers").fill("1")
    card.get_by_role("button", name="Adapt").click()
    expect(card.get_by_role("alert")).to_contain_text("3")  # fewer at most than at least
    card.get_by_label("Fewest workers").fill("1")
    card.get_by_role("button", name="Adapt").click()
    expect(card.get_by_role("alert")).to_have_count(0)
    card.get_by_role("button", name="Stop", exact=True).click()
    question = card.get_by_role("alertdialog")
    expect(question).to_contain_text("Nothing runs on it.")
    page.keyboard.press("Escape")
    expect(question).to_have_count(0)
    card.get_by_role("button", name="Stop", exact=True).click()
    question.get_by_role("button", name="Stop by-mouse").click()
    expect(card).to_have_count(0, timeout=START_MS)


@contextlib.contextmanager
def cluster_elsewhere() -> Iterator[str]:
    """A Dask cluster of another process; the address of its scheduler."""
    with subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        yield process.stdout.readline().strip()
        process.communicate("", timeout=60)
        assert process.returncode == 0


def test_a_cluster_that_runs_elsewhere_is_joined_by_its_address_and_left(page: Page) -> None:
    clusters = page.locator(f"{SIDEBAR} section[aria-label='Clusters']")
    clusters.get_by_role("button", name="New cluster").click()
    form = clusters.get_by_role("form", name="New cluster")
    form.get_by_label("Kind").select_option(label="one that runs already …")
    form.get_by_label("Address of its scheduler").fill("tcp://127.0.0.1:9")
    form.get_by_label("Name").fill("elsewhere")
    form.get_by_role("button", name="Connect").click()
    expect(form.get_by_role("alert")).to_contain_text("127.0.0.1:9", timeout=START_MS)  # nobody is there
    with cluster_elsewhere() as address:
        form.get_by_label("Address of its scheduler").fill(address)
        form.get_by_role("button", name="Connect").click()
        card = clusters.get_by_role("article", name="Cluster elsewhere")
        expect(card).to_contain_text("It was started elsewhere", timeout=START_MS)
        expect(card.get_by_role("button", name="Scale", exact=True)).to_have_count(0)
        card.get_by_role("button", name="Leave").click()
        expect(card.get_by_role("alertdialog")).to_contain_text("It runs on.")
        card.get_by_role("button", name="Leave elsewhere").click()
        expect(card).to_have_count(0, timeout=START_MS)


def test_a_run_begins_and_ends_in_the_sidebar_and_its_tab_is_there_after_a_reload(
    context: BrowserContext, lab: Lab, alone: None, pictures: Path
) -> None:
    page = open_lab(context, lab, "train.ipynb")
    open_sidebar(page)
    expect(page.locator(STATUS)).to_have_text("no runs")
    start_cell(page, 0)
    start_cell(page, 1)
    row = page.locator(f"{SIDEBAR} .llmc-runrow").filter(has_text="painted")
    expect(row).to_contain_text("running", timeout=START_MS)
    expect(page.locator(STATUS)).to_have_text("1 run")
    row.get_by_role("button", name="painted", exact=True).click()
    tab = page.locator(".llmc-Tab .llmc-card").filter(has_text="painted")
    expect(tab).to_be_visible()
    wait_until_saved(page, "llmcloud-run")
    page.goto(f"{lab.url}lab?token={lab.token}")
    page.wait_for_function("() => window.jupyterapp !== undefined")
    page.evaluate("async () => { await window.jupyterapp.restored; }")
    expect(page.locator(".lm-TabBar-tabLabel", has_text="painted").first).to_be_visible()
    expect(page.locator(".llmc-Tab .llmc-card").filter(has_text="painted")).to_be_visible()
    row = page.locator(f"{SIDEBAR} .llmc-runrow").filter(has_text="painted")
    expect(row).to_contain_text("finished", timeout=START_MS)
    expect(page.locator(STATUS)).to_have_text("no runs")
    look(page, pictures, "run-tab", SIDEBAR)


def test_the_ranks_of_a_notebook_are_looked_at_and_their_slots_released(page: Page, pictures: Path) -> None:
    holder = page.get_by_role("list", name="Who holds its slots").locator("li").filter(has_text="train.ipynb")
    holder.get_by_role("button", name="Ranks").click()
    ranks = page.locator(".llmc-Tab section[aria-label='Ranks']")
    ranks.get_by_role("button", name="Variables").click()
    expect(ranks.get_by_role("region", name="Variables of rank 0")).to_contain_text("step")
    ranks.get_by_role("button", name="What are they doing now?").click()
    expect(ranks.get_by_label("Stacks")).to_contain_text("rank", ignore_case=True)
    look(page, pictures, "ranks", ".llmc-Tab")
    holder.get_by_role("button", name="Release").first.click()
    expect(holder.get_by_role("alertdialog")).to_contain_text("their variables are lost")
    holder.get_by_role("alertdialog").get_by_role("button", name="Release").click()
    expect(holder).to_have_count(0)
    expect(ranks).to_contain_text("This world has ended")


def test_an_endpoint_answers_in_its_playground_and_its_key_is_made_and_revoked(
    context: BrowserContext, page: Page, lab: Lab, pictures: Path, tmp_path: Path
) -> None:
    folder = save_tiny_llama(tmp_path / "poet", chat_template=CHAT_TEMPLATE)
    headers = {"Authorization": f"token {lab.token}"}
    url = f"{lab.url}llmcloud"
    asked = context.request.post(f"{url}/api/endpoints", headers=headers, data={"target": str(folder), "name": "poet"})
    assert asked.status == 201, asked.text()
    card = page.locator(SIDEBAR).get_by_role("article", name="Endpoint poet")
    expect(card).to_contain_text("1 of 1 replicas ready", timeout=START_MS)
    card.get_by_role("button", name="Playground of poet").click()
    panel = page.locator(".llmc-Tab section[aria-label='Endpoints']")
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
    models = f"{url}/v1/models"
    assert context.request.get(models, headers={"Authorization": f"Bearer {key}"}).ok
    row = panel.locator(".llmc-key").filter(has_text="a test")
    look(page, pictures, "endpoint", ".llmc-Tab")
    row.get_by_role("button", name="Revoke the key").click()
    row.get_by_role("alertdialog").get_by_role("button", name="Revoke").click()
    expect(row).to_have_count(0)
    expect(panel.locator(".llmc-secret")).to_have_count(0)
    assert context.request.get(models, headers={"Authorization": f"Bearer {key}"}).status == 401
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    card.get_by_role("button", name="Stop the endpoint poet").click()
    card.get_by_role("button", name="Stop poet").click()
    expect(card).to_contain_text("stopped", timeout=START_MS)
    for cluster in context.request.get(f"{url}/api/clusters", headers=headers).json()["clusters"]:
        assert context.request.delete(f"{url}/api/clusters/{cluster['name']}", headers=headers).ok
