"""The notebook about smaller models runs as a whole: made, measured, taught again, served in place, exported."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.leaks import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "compress.ipynb"


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell shows."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    texts += [output.data["text/plain"] for output in cell.outputs if "data" in output]
    return "\n".join(texts)


def test_the_notebook_about_smaller_models_is_saved_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("shared_server")
def test_the_notebook_about_smaller_models_does_what_it_says(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    by_id["parameters"].source = "num_steps = 10"
    by_id["text"].source = by_id["text"].source.replace("list(topics.values())", "list(topics.values())[:30]")
    by_id["compress"].source = by_id["compress"].source.replace("int8,int4,bf16,prune:0.25", "int8")
    by_id["distill"].source = by_id["distill"].source.replace(
        "lc.compress(", 'lc.compress("reference-gpt", "prune:0.25", no_table=True)\nlc.compress(', 1
    )
    by_id["distill"].source = by_id["distill"].source.replace("steps=num_steps,", "steps=num_steps, no_table=True,")
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    table = text_of(by_id["compress"])
    assert re.search(
        r"^reference-gpt +[\d.]+ MB +[\d.e+]+ +\d+ +\d+ +[\d.]+ ms +[\d.]+ [MG]B +slots +as it was", table, re.M
    )
    assert re.search(r"^reference-gpt-int8 .* slots ", table, re.M) and "of the variable held_out;" in table
    assert re.search(r"^reference-gpt-small +10 steps of distillation", text_of(by_id["distill"]), re.M)
    assert text_of(by_id["serve"]).strip()
    assert "ONNX Runtime: largest difference of scores" in text_of(by_id["onnx"])
    assert "reference-gpt-small.gguf" in text_of(by_id["gguf"])
