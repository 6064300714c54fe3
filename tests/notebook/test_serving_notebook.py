"""The notebook about serving runs as a whole: structured output, a classifier, a canary, quotas, a batch, feedback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.client.rest import ServerClient
from tests.support.leaks import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "serving.ipynb"


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, and its value."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    texts += [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    return "".join(texts)


def test_the_notebook_is_saved_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_notebook_about_serving_does_what_it_says(shared_server: ServerClient, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    by_id["parameters"].source = "num_steps = 12"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "keyword=" in text_of(by_id["json"]) and "compound=" in text_of(by_id["json"])
    assert text_of(by_id["tools"]).startswith("lookup {'keyword': ")
    assert [line.split()[0] for line in text_of(by_id["predict"]).splitlines()] == ["file", "error"]
    assert text_of(by_id["split"]).count(":") >= 2, "two revisions have answered"
    assert "a colleague" in text_of(by_id["usage"])
    assert re.match(r"after [6-9]: key ", text_of(by_id["quota"])), (
        "one more is allowed for each ten seconds that they took"
    )
    assert "30 answers, the first one:" in text_of(by_id["map"])
    row = json.loads((tmp_path / "next.jsonl").read_text())
    assert row["messages"][-1]["content"] == "It goes over the items of an iterable."
    assert "sk-llmc-" not in nbformat.writes(notebook)
