"""The panels outside JupyterLab: in Notebook 7, and as a file of a notebook that nothing but a browser opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Locator, Page, expect

from tests.support.axe import look
from tests.support.browser import write_notebook
from tests.support.lab import Lab, running_lab

pytestmark = [pytest.mark.story, pytest.mark.browser]

START_MS = 180_000
RUN = """%%distribute -n 2 --name seven
import time
for step in range(100):
    run.log(loss=1 / (step + 1), step=step)
    time.sleep(0.01)
"""
CELLS = [
    "import jupyter_llmcloud as lc\n%load_ext jupyter_llmcloud",
    RUN,
    "%world",
    "lc.ClusterPanel()",
    "%cluster stop",
]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook7") / "notebooks"
    folder.mkdir()
    return write_notebook(folder / "seven.ipynb", CELLS)


@pytest.fixture(scope="module")
def server(notebook: Path, module_root: Path) -> Iterator[Lab]:
    """Jupyter Notebook 7."""
    with running_lab(notebook.parent, app=("notebook", "JupyterNotebookApp")) as running:
        yield running
        running.end_clusters()


def open_notebook(browser: Browser, server: Lab, name: str) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(START_MS)
    page.goto(f"{server.url}notebooks/{name}?token={server.token}")
    page.wait_for_function("() => window.jupyterapp !== undefined", timeout=START_MS)
    page.evaluate(
        """async () => {
            await window.jupyterapp.restored;
            const context = window.jupyterapp.shell.currentWidget.sessionContext;
            await context.ready;
            await context.session.kernel.info;
        }"""
    )
    return page


def cell(page: Page, index: int) -> Locator:
    return page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{index}']")


def run(page: Page, index: int) -> Locator:
    """Run a cell by keyboard until it has ended; returns its output."""
    cell(page, index).locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    prompt = cell(page, index).locator(".jp-InputPrompt").first
    expect(prompt).to_have_text(f"[{index + 1}]:", timeout=START_MS)
    return cell(page, index).locator(".jp-OutputArea-output")


def test_notebook_7_shows_the_panels_and_again_after_a_reload(
    browser: Browser, server: Lab, notebook: Path, pictures: Path
) -> None:
    page = open_notebook(browser, server, notebook.name)
    run(page, 0)
    card = run(page, 1).locator(".llmc-run")
    expect(card.locator(".llmc-state")).to_have_text("finished")
    expect(card.locator(".llmc-plot")).to_be_visible()
    expect(run(page, 2).locator("section[aria-label='Ranks'] tbody tr")).to_have_count(2)
    clusters = run(page, 3).locator("section[aria-label='Clusters']")
    expect(clusters.get_by_role("list", name="Who holds its slots")).to_contain_text("2 slots")
    cell(page, 1).scroll_into_view_if_needed()
    look(page, pictures, "notebook-7", ".jp-Notebook .llmc-card")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save'); }")
    page.reload()
    again = cell(page, 1).locator(".llmc-run")
    expect(again.locator(".llmc-plot")).to_be_visible(timeout=START_MS)
    expect(again.locator(".llmc-state")).to_have_text("finished")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel")
    cell(page, 4).locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    expect(cell(page, 4).locator(".jp-InputPrompt").first).to_have_text("[5]:", timeout=START_MS)
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")
    page.close()


def test_the_saved_notebook_is_readable_without_widgets_and_without_a_server(
    browser: Browser, notebook: Path, tmp_path: Path, pictures: Path
) -> None:
    document = nbformat.read(notebook, as_version=4)
    forms = [output.data for cell in document.cells for output in cell.get("outputs", []) if "data" in output]
    assert all("text/plain" in data and "text/html" in data for data in forms) and len(forms) >= 3
    html, _ = HTMLExporter().from_notebook_node(document)
    (tmp_path / "seven.html").write_text(html, encoding="utf-8")
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.route("http*://**", lambda route: route.abort())  # a file needs nothing from elsewhere
    page.goto((tmp_path / "seven.html").as_uri(), wait_until="domcontentloaded")
    body = page.locator("body")
    expect(body).to_contain_text("seven")
    expect(body).to_contain_text("finished")
    expect(page.locator(".jp-OutputArea-output img, .jp-OutputArea-output svg").first).to_be_visible()
    for words in ("Loading widget", "Error displaying widget", "Could not render"):
        expect(page.get_by_text(words)).to_have_count(0)
    page.screenshot(path=pictures / "saved-notebook.png")
    page.close()
