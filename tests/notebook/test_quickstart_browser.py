"""The quickstart in JupyterLab, cell by cell with Shift+Enter, as a new user goes through it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Locator, Page, expect

from tests.support import browser
from tests.support.lab import Lab, open_lab, running_lab

pytestmark = [pytest.mark.story, pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
CARD = ".llmc-run"
PLOT = f"{CARD} .llmc-chart .llmc-plot"
MANY, FEW = 5000, 8
CELL_S = 180.0  # on a machine that is busy
# What is looked at here is the page: less text and a small model do. test_quickstart takes the model as it is.
SMALLER = {
    'sorted(library.rglob("*.py"))': 'sorted(library.glob("[a-d]*.py"))',
    "WINDOW = 256": "WINDOW = 64",
    "hidden_size=256": "hidden_size=64",
    "intermediate_size=768": "intermediate_size=128",
    "num_hidden_layers=4": "num_hidden_layers=1",
    "max_tokens=80": "max_tokens=20",  # a window of 64 holds the question, too
}


@pytest.fixture
def lab(own_root: Path, tmp_path: Path) -> Iterator[Lab]:
    """A server, its clusters and its runs are this test's own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook = nbformat.read(QUICKSTART, 4)
    for cell in notebook.cells:
        cell.source = re.sub(r"^num_steps = \d+$", f"num_steps = {MANY}", cell.source, flags=re.MULTILINE)
        for whole, part in SMALLER.items():
            cell.source = cell.source.replace(whole, part)
    assert all(part in str(notebook) for part in SMALLER.values())
    nbformat.write(notebook, folder / "quickstart.ipynb")
    with running_lab(folder) as running:
        yield running
        running.end_clusters()


def _index(containing: str) -> int:
    cells = nbformat.read(QUICKSTART, 4).cells
    return next(i for i, cell in enumerate(cells) if cell.cell_type == "code" and containing in cell.source)


def _run(page: Page, index: int) -> Locator:
    """Run a cell by keyboard until it has ended; returns its output, which may be drawn a moment later."""
    browser.press_shift_enter(page, index)
    browser.wait_for_cell(page, index, CELL_S)
    return browser.show_cell(page, index)


def test_the_quickstart_trains_stops_serves_and_answers(
    chromium: Browser, lab: Lab, tmp_path: Path, pictures: Path
) -> None:
    """Charts grow while it trains, Stop ends it with the variables kept, the model then serves and streams."""
    page = open_lab(chromium, lab, "quickstart.ipynb")
    training = _index("%%distribute")
    for index in range(training):
        if nbformat.read(QUICKSTART, 4).cells[index].cell_type == "code":
            _run(page, index)

    browser.press_shift_enter(page, training)
    expect(page.locator(PLOT).first).to_be_visible(timeout=1000 * CELL_S)
    page.wait_for_function(
        "(plot) => Number(document.querySelector(plot)?.dataset.points) > 8", arg=PLOT, timeout=1000 * CELL_S
    )
    page.locator(CARD).screenshot(path=str(pictures / "quickstart-training.png"))
    page.locator(CARD).get_by_role("button", name=re.compile("stop", re.IGNORECASE)).click()
    browser.wait_for_cell(page, training, CELL_S)
    stopped = browser.show_cell(page, training)
    expect(stopped.filter(has_text="KeyboardInterrupt").first).to_contain_text("variables kept")
    page.screenshot(path=str(pictures / "quickstart-stopped.png"))

    page.evaluate(
        "([index, few]) => { const cell = window.jupyterapp.shell.currentWidget.content.widgets[index].model;"
        " const source = cell.sharedModel.source.replace(/num_steps = \\d+/, `num_steps = ${few}`);"
        " cell.sharedModel.setSource(source); }",
        [_index("num_steps ="), FEW],
    )
    _run(page, _index("num_steps ="))
    expect(_run(page, training).filter(has_text=f"step {FEW}: validation loss")).not_to_have_count(0)
    expect(_run(page, _index("bigram_loss")).first).to_contain_text("of the bigram model")
    served = _run(page, _index("%serve pydoc-gpt"))
    expect(served.filter(has_text="/llmcloud/v1")).not_to_have_count(0)
    assert "sk-llmc" not in "".join(served.all_inner_texts())
    expect(_run(page, _index("completions.create")).first).to_contain_text("The for statement")
    told = " ".join(_run(page, _index("stream=True")).all_inner_texts())
    assert told.strip() and "Traceback (most recent" not in told, told  # the model says any word that it has seen
    page.screenshot(path=str(pictures / "quickstart-served.png"))
    _run(page, _index("ep.stop()"))
    browser.save(page)
    _assert_reads_well_without_a_kernel(tmp_path / "notebooks" / "quickstart.ipynb", chromium, pictures)
    browser.end_kernel(page)


def _assert_reads_well_without_a_kernel(path: Path, chromium: Browser, pictures: Path) -> None:
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)
    assert "sk-llmc" not in nbformat.writes(notebook)
    html, _ = HTMLExporter().from_notebook_node(notebook)
    assert "svg" in html and "valid_loss" in html
    page = chromium.new_page()
    page.set_content(html)
    page.screenshot(path=str(pictures / "quickstart-saved.png"), full_page=True)
    page.close()
