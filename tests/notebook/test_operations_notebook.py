"""The notebook about what a run says of itself runs as a whole, and says it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.storage.runs import RunStore
from tests.support.leaks import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "operations.ipynb"


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell shows as text."""
    told = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "\n".join(told)


def test_the_notebook_is_saved_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_notebook_about_operations_does_what_it_says(shared_server: ServerClient, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "all weights finite: True" in text_of(cells["watched"])
    alerts = RunStore().find("watched").alerts()
    assert {("not-finite", 38.0), ("loss-spike", 200.0)} <= {(alert["detector"], alert["step"]) for alert in alerts}
    told = text_of(cells["alerts"])
    assert "not-finite: loss is NaN at step 38" in told and "threshold 6, over the last 128 values" in told
    assert "; the run goes back to before step 201 (--watch loss-spike=rollback)" in text_of(cells["back"])
    assert "rank-hours at 2.50 an hour: about " in text_of(cells["back"])
    assert text_of(cells["left-out"]) == "steps that change nothing: [[201, 202]]\n"
    [error] = [output for output in cells["broken"].outputs if output.output_type == "error"]
    assert "rank 1" in error.evalue
    assert "why" in text_of(cells["show"]) and "rank 1" in text_of(cells["show"])
    assert text_of(cells["after"]).count("has the model still: 9 parameters") == 2
