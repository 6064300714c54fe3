"""The notebook about plans runs as a whole, and its table is true: synchronous plans have trained one model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.client.rest import ServerClient
from tests.support.leaks import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "plans.ipynb"


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_the_notebook_is_saved_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_notebook_about_plans_does_what_it_says(shared_server: ServerClient, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    by_id["parameters"].source = "num_epochs = 1"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    table = {row.split()[0]: row.split()[1:] for row in text_of(by_id["compare"]).splitlines()[1:]}
    assert list(table) == ["ddp", "fsdp", "tp:2", "pipeline:2", "diloco:8", "async-ps:4"]
    held = {plan: int(row[0].replace(",", "")) for plan, row in table.items()}
    assert held["fsdp"] == held["ddp"] // 2 and held["diloco:8"] == held["ddp"]
    assert held["tp:2"] < 0.6 * held["ddp"] and held["pipeline:2"] < 0.6 * held["ddp"]
    assert all(float(table[plan][3]) < 1e-3 for plan in ("ddp", "fsdp", "tp:2", "pipeline:2"))
    [refused] = [output for output in by_id["refused"].outputs if output.output_type == "error"]
    assert "needs 4 ranks, this world has 2" in refused.evalue
    assert text_of(by_id["serve"]).strip()
