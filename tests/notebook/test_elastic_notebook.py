"""The notebook about elastic runs does what it says: a worker is taken away, one comes, and the losses are as without."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.client.rest import ServerClient
from tests.notebook.test_plans_notebook import text_of
from tests.support.leaks import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "elastic.ipynb"


def test_the_notebook_is_saved_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_notebook_about_elastic_runs_does_what_it_says(shared_server: ServerClient, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = re.fullmatch(r"finished: (\d+) resizes, 0 restarts used up\n", text_of(by_id["result"]))
    assert told is not None and int(told[1]) >= 2  # the new worker may lose its place to another one
    found = re.match(r"640 steps, .* undisturbed (\S+)\n", text_of(by_id["compare"]))
    assert found is not None and float(found[1]) < 1e-4
