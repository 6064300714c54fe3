"""Clusters in the sidebar, real ones: started, scaled, ended by mouse and by keyboard, joined where they run already."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.support.axe import look
from tests.support.lab import Lab, open_lab

pytestmark = pytest.mark.browser

SIDEBAR = "#llmcloud-sidebar"
START_MS = 180_000
ELSEWHERE = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def page(context: BrowserContext, lab: Lab) -> Iterator[Page]:
    """JupyterLab with the sidebar open."""
    page = open_lab(context, lab)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('llmcloud:open-panel'); }")
    expect(page.locator(SIDEBAR)).to_be_visible()
    yield page
    page.close()


@pytest.fixture
def clusters(page: Page, lab: Lab) -> Iterator[Locator]:
    """The part of the sidebar with the clusters, its form closed; clusters end with the test."""
    part = page.locator(f"{SIDEBAR} section[aria-label='Clusters']")
    if part.get_by_role("form", name="New cluster").count():
        part.get_by_role("button", name="Close").click()
    yield part
    lab.end_clusters()


@pytest.mark.story
def test_a_cluster_is_started_scaled_and_stopped_by_mouse_and_by_keyboard(
    page: Page, clusters: Locator, pictures: Path
) -> None:
    """The first half by mouse, the rest by keyboard."""
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

    card.get_by_role("button", name="adapt …").focus()
    page.keyboard.press("Enter")
    card.get_by_label("Fewest workers").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("3")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    expect(card.get_by_role("alert")).to_contain_text("3")  # fewer at most than at least
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    expect(card.get_by_role("alert")).to_have_count(0)

    stop = card.get_by_role("button", name="Stop", exact=True)
    stop.focus()
    page.keyboard.press("Enter")
    question = card.get_by_role("alertdialog")
    expect(question).to_contain_text("Nothing runs on it.")
    expect(question.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Escape")
    expect(question).to_have_count(0)
    expect(stop).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(question.get_by_role("button", name="Stop by-mouse")).to_be_focused()
    page.keyboard.press("Enter")
    expect(card).to_have_count(0, timeout=START_MS)
    page.wait_for_function("() => document.activeElement?.closest('#llmcloud-sidebar')")  # the focus has not fled


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


def test_a_cluster_that_runs_elsewhere_is_joined_by_its_address_and_left(page: Page, clusters: Locator) -> None:
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
        card.get_by_role("alertdialog").get_by_role("button", name=re.compile("^Leave elsewhere")).click()
        expect(card).to_have_count(0, timeout=START_MS)
