"""The notebook about data runs as a whole: prepared, gone on with, trained on, killed, resumed at the row."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.leaks import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "data.ipynb"


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell shows."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    texts += [output.data["text/plain"] for output in cell.outputs if "data" in output]
    return "\n".join(texts)


def test_the_notebook_about_data_is_saved_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("shared_server")
def test_the_notebook_about_data_does_what_it_says(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    by_id["parameters"].source = "num_documents = 1000"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, again = text_of(by_id["prepare"]), text_of(by_id["again"])
    (num_new,) = re.findall(r"(\d+) of them new", first)
    assert int(num_new) > 3 and "1 of them new, 1 new files" in again
    assert re.search(r"part-4.jsonl\n *all ", text_of(by_id["shards"]))
    # Two steps after its moment the third checkpoint may still be being written.
    assert re.search(r"resumed from step 1[05] \(restart 1 of 1\)", text_of(by_id["train"]))
    told = text_of(by_id["ledger"])
    assert told.count("each once: True") == 2 and "rank 1 was killed: True" in told
