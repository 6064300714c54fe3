"""The runs in JupyterLab's status bar: counted, listed, stopped, and explained where they cannot be shown."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.lab import Lab, open_lab, running_lab

pytestmark = pytest.mark.browser

STATUS = ".llmc-RunsStatus"
LIST = ".llmc-RunList"
OpenWith = Callable[[Callable[[Route], None]], Page]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One JupyterLab for this module, with the extension as installing the package enables it."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    with running_lab(folder) as running:
        yield running


def run(name: str, **changes: Any) -> dict[str, Any]:
    """A run as the server tells it."""
    told = {
        "run_id": uuid.uuid4().hex,
        "name": name,
        "state": "running",
        "created": time.time() - 65,
        "ended": None,
        "world_size": 2,
        "ranks": [0, 1],
        "artifacts": {},
        "progress": [30, 120],
        "metrics": {"lr": 0.001, "loss": 2.345678},
    }
    return told | changes


class FakeRuns:
    """Answers the routes of the runs as the server would, and remembers what it was asked."""

    def __init__(self, *runs: dict[str, Any]) -> None:
        self.runs = list(runs)
        self.stopped: list[str] = []
        self.refusal = ""

    def __call__(self, route: Route) -> None:
        found = re.search(r"/runs/([^/]+)/stop$", urlsplit(route.request.url).path)
        if found is None:
            active = "state=active" in route.request.url
            chosen = [told for told in self.runs if not active or told["ended"] is None]
            route.fulfill(json={"runs": chosen})
        elif self.refusal:
            route.fulfill(status=409, json={"error": "ConnectionLost", "message": self.refusal})
        else:
            self._stop(found[1])
            route.fulfill(json={"state": "stopped"})

    def _stop(self, run_id: str) -> None:
        self.stopped.append(run_id)
        for told in self.runs:
            if told["run_id"] == run_id:
                told.update(state="stopped", ended=time.time())


@pytest.fixture
def jp_asyncio_loop() -> None:
    """None of a test's own: the browser's runs in this thread."""


@pytest.fixture(scope="module")
def context(one_chromium: Browser) -> BrowserContext:
    """Pages of one user: what JupyterLab consists of is loaded once."""
    return one_chromium.new_context()


@pytest.fixture
def open_with(context: BrowserContext, lab: Lab) -> Iterator[OpenWith]:
    """Opens JupyterLab with the routes of the runs answered by a fake."""

    def opened(answer: Callable[[Route], None]) -> Page:
        context.route(re.compile(r"/llmcloud/api/runs"), answer)
        return open_lab(context, lab)

    yield opened
    for page in context.pages:
        page.close()
    context.unroute_all()


def test_the_status_bar_counts_the_runs_and_a_click_lists_them(open_with: OpenWith, pictures: Path) -> None:
    page = open_with(FakeRuns(run("pydoc-gpt"), run("second", progress=None, metrics={})))
    expect(page.locator(STATUS)).to_have_text("2 runs")
    page.locator(STATUS).click()
    row = page.locator(f"{LIST} .llmc-Run").first
    for text in ("pydoc-gpt", "running", "30/120", "loss 2.346", re.compile(r"[12] min [0-5]\d s")):
        expect(row).to_contain_text(text)
    expect(row.locator("progress")).to_have_js_property("value", 30)
    page.screenshot(path=pictures / "status-bar-runs.png")
    row.get_by_role("button", name="Stop").press("Escape")  # wherever the page had its focus
    expect(page.locator(LIST)).to_have_count(0)


def test_stop_asks_the_server_and_the_list_tells_what_came_of_it(open_with: OpenWith) -> None:
    runs = FakeRuns(run("one"), run("other"))
    page = open_with(runs)
    page.locator(STATUS).click()
    page.locator(LIST).get_by_role("button", name="Stop").first.click()
    expect(page.locator(f"{LIST} .llmc-Run").first).to_contain_text("stopped")
    expect(page.locator(f"{LIST} .llmc-Run").first.get_by_role("button")).to_be_hidden()
    expect(page.locator(STATUS)).to_have_text("1 run")
    assert runs.stopped == [runs.runs[0]["run_id"]]


def test_a_stop_that_is_refused_says_why(open_with: OpenWith) -> None:
    runs = FakeRuns(run("one"))
    runs.refusal = "the agent that leads this run cannot be reached."
    page = open_with(runs)
    page.locator(STATUS).click()
    button = page.locator(LIST).get_by_role("button", name="Stop")
    button.click()
    expect(page.locator(LIST)).to_contain_text(runs.refusal)
    expect(button).to_be_enabled()


def test_a_name_is_shown_as_text_whatever_it_contains(open_with: OpenWith) -> None:
    name = "<img src=x onerror=window.broken=1>"
    page = open_with(FakeRuns(run(name)))
    page.locator(STATUS).click()
    expect(page.locator(".llmc-Run-name")).to_have_text(name)
    assert page.evaluate("() => window.broken") is None


def test_a_server_that_does_not_answer_is_said_and_asked_again(
    open_with: OpenWith,
) -> None:
    is_up = False

    def answer(route: Route) -> None:
        if is_up:
            route.fulfill(json={"runs": [run("back")]})
        else:
            route.abort()

    page = open_with(answer)
    expect(page.locator(STATUS)).to_have_text("runs: no answer")
    page.locator(STATUS).click()
    expect(page.locator(LIST)).to_contain_text("does not answer")
    is_up = True
    page.locator(LIST).get_by_role("button", name="Try again").click()
    expect(page.locator(STATUS)).to_have_text("1 run")


def test_runs_on_disk_are_listed_by_the_real_server(context: BrowserContext, lab: Lab) -> None:
    ended = RunRecord("ended-1", "ended-run", "finished", created=time.time() - 10, ended=time.time(), world_size=2)
    RunStore().folder(ended.run_id).create(ended, "1 + 1")
    page = open_lab(context, lab)
    expect(page.locator(STATUS)).to_have_text("no runs")
    page.locator(STATUS).click()
    expect(page.locator(f"{LIST} .llmc-Run").filter(has_text="ended-run")).to_contain_text("finished")


def test_a_server_without_the_extension_is_explained(one_chromium: Browser, tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    off = {"ServerApp": {"jpserver_extensions": {"jupyter_llmcloud": False}}}
    with running_lab(folder, off) as without:
        page = open_lab(one_chromium, without)
        expect(page.locator(STATUS)).to_have_text("runs: not enabled")
        page.locator(STATUS).click()
        expect(page.locator(LIST)).to_contain_text("jupyter server extension list")
        page.screenshot(path=pictures / "status-bar-not-enabled.png")
