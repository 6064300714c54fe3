"""Notebooks in a browser: written, opened in JupyterLab, run cell by cell, looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, Page

_RUN = """async (index) => {
    const panel = window.jupyterapp.shell.currentWidget;
    panel.content.widgets[index].model.executionCount = null;
    panel.content.activeCellIndex = index;
    panel.content.deselectAll();
    await window.jupyterapp.commands.execute("notebook:run-cell");
}"""
_START = _RUN.replace("await window.jupyterapp.commands", "void window.jupyterapp.commands")
# A cell that is run again is idle until the page has come to it: its number was taken away, and it has one when it ends.
_IS_DONE = """(index) => {
    const { executionState, executionCount } = window.jupyterapp.shell.currentWidget.content.widgets[index].model;
    return executionState === "idle" && executionCount !== null;
}"""
_SELECT = """(index) => {
    const panel = window.jupyterapp.shell.currentWidget;
    panel.content.widgets[index].model.executionCount = null;
    panel.content.activeCellIndex = index;
    panel.content.deselectAll();
    panel.content.mode = "command";
    panel.content.activate();
}"""
_SHOW = """async (index) => {
    const { content } = window.jupyterapp.shell.currentWidget;
    await content.scrollToItem(index, "smart");
    await content.widgets[index].ready;
}"""
_OPEN = """async (path) => {
    const panel = await window.jupyterapp.commands.execute("docmanager:open", { path });
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
}"""
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"


def write_notebook(path: Path, cells: Sequence[str]) -> Path:
    """A notebook with these code cells, for the kernel of this Python."""
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells], metadata={"kernelspec": spec})
    nbformat.write(notebook, path)
    return path


def start_cell(page: Page, index: int) -> None:
    """Run a cell and return at once."""
    page.evaluate(_START, index)


def press_shift_enter(page: Page, index: int) -> None:
    """Run a cell by keyboard and return at once."""
    page.evaluate(_SELECT, index)
    page.keyboard.press("Shift+Enter")


def show_cell(page: Page, index: int) -> Locator:
    """Scroll to a cell: one that is far from view is in no document; returns its output."""
    page.evaluate(_SHOW, index)
    return output_of(page, index)


def run_cell(page: Page, index: int, timeout_s: float = 60) -> Locator:
    """Run a cell until it has ended; returns its output."""
    page.evaluate(_RUN, index)
    return wait_for_cell(page, index, timeout_s)


def wait_for_cell(page: Page, index: int, timeout_s: float = 60) -> Locator:
    """Wait until a started cell has ended; returns its output."""
    page.wait_for_function(_IS_DONE, arg=index, timeout=timeout_s * 1000)
    return output_of(page, index)


def output_of(page: Page, index: int) -> Locator:
    """The output area of a cell."""
    return page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{index}'] .jp-OutputArea-output")


def open_notebook(page: Page, name: str) -> None:
    """Open a notebook in a page of JupyterLab and wait for its kernel."""
    page.evaluate(_OPEN, name)


def close_notebook(page: Page) -> None:
    """End the kernel of the notebook that is open, and close it."""
    end_kernel(page)
    page.evaluate("() => { window.jupyterapp.shell.currentWidget.dispose(); }")


def save(page: Page) -> None:
    """Save the notebook that is open."""
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.context.save(); }")


def set_theme(page: Page, theme: str) -> None:
    """Change JupyterLab's theme and wait until it is on."""
    page.evaluate(
        "async (theme) => { await window.jupyterapp.commands.execute('apputils:change-theme', { theme }); }",
        theme,
    )
    page.wait_for_function("(theme) => document.body.dataset.jpThemeName === theme", arg=theme)
    page.wait_for_function("() => document.getElementById('jupyterlab-splash') === null")


def end_kernel(page: Page) -> None:
    """End the kernel of the notebook that is open."""
    page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")
