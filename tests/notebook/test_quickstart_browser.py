"""The quickstart in JupyterLab, cell by cell with Shift+Enter, as a new user goes through it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Page, expect

from tests.support import browser
from tests.support.lab import Lab, open_lab, running_lab

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(420)]

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
CARD = ".llmc-run"
PLOT = f"{CARD} .llmc-chart .llmc-plot"
MANY, FEW = 5000, 8
# What is looked at here is the page: less text and a small model do. test_quickstart takes all of it.
SMALLER = {
    'sorted(library.rglob("*.py"))': 'sorted(library.glob("[a-d]*.py"))',
    "WINDOW = 256": "WINDOW = 64",
    "hidden_size=256": "hidden_size=64",
    "intermediate_size=768": "intermediate_size=128",
    "num_hidden_layers=4": "num_hidden_layers=1",
}
_SELECT = """(index) => {
    const panel = window.jupyterapp.shell.currentWidget;
    panel.content.activeCellIndex = index;
    panel.content.deselectAll();
    panel.content.mode = "command";
    panel.content.activate();
}"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
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


def _index(containing: str) -> int:
    cells = nbformat.read(QUICKSTART, 4).cells
    return next(i for i, cell in enumerate(cells) if cell.cell_type == "code" and containing in cell.source)


def _shift_enter(page: Page, index: int) -> None:
    page.evaluate(_SELECT, index)
    page.keyboard.press("Shift+Enter")


def _run(page: Page, index: int, timeout_s: float = 120) -> str:
    _shift_enter(page, index)
    return "\n".join(browser.wait_for_cell(page, index, timeout_s).all_inner_texts())


def test_the_quickstart_trains_stops_serves_and_answers(
    chromium: Browser, lab: Lab, tmp_path: Path, pictures: Path
) -> None:
    """Charts grow while it trains, Stop ends it with the variables kept, the model then serves and streams."""
    page = open_lab(chromium, lab, "quickstart.ipynb")
    training = _index("%%distribute")
    for index in range(training):
        if nbformat.read(QUICKSTART, 4).cells[index].cell_type == "code":
            _run(page, index)

    _shift_enter(page, training)
    expect(page.locator(PLOT).first).to_be_visible(timeout=120_000)
    page.wait_for_function(
        "(plot) => Number(document.querySelector(plot)?.dataset.points) > 8", arg=PLOT, timeout=120_000
    )
    page.locator(CARD).screenshot(path=str(pictures / "quickstart-training.png"))
    page.locator(CARD).get_by_role("button", name=re.compile("stop", re.IGNORECASE)).click()
    output = "\n".join(browser.wait_for_cell(page, training, 30).all_inner_texts())
    assert "KeyboardInterrupt" in output and "variables kept" in output
    page.screenshot(path=str(pictures / "quickstart-stopped.png"))

    page.evaluate(
        "([index, few]) => { const cell = window.jupyterapp.shell.currentWidget.content.widgets[index].model;"
        " const source = cell.sharedModel.source.replace(/num_steps = \\d+/, `num_steps = ${few}`);"
        " cell.sharedModel.setSource(source); }",
        [_index("num_steps ="), FEW],
    )
    _run(page, _index("num_steps ="))
    trained = _run(page, training, 180)
    assert f"step {FEW}: validation loss" in trained
    assert "of the bigram model" in _run(page, _index("bigram_loss"))
    served = _run(page, _index("%serve pydoc-gpt"), 60)
    assert "/llmcloud/v1" in served and "sk-llmc" not in served
    assert "The for statement" in _run(page, _index("completions.create"), 60)
    _run(page, _index("stream=True"), 60)
    page.screenshot(path=str(pictures / "quickstart-served.png"))
    _run(page, _index("ep.stop()"), 60)
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
