"""The notebook about hyperparameters runs as a whole: a rate, a batch, a sweep with pruned trials, its best one served."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.notebook.test_data_notebook import text_of
from tests.support.leaks import REPOSITORY

pytest.importorskip("optuna")
NOTEBOOK = REPOSITORY / "notebooks" / "sweep.ipynb"


def test_the_notebook_about_sweeps_is_saved_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("shared_server")
def test_the_notebook_about_sweeps_does_what_it_says(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    by_id["parameters"].source = "num_trials = 5\npopulation = 2"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert re.search(r"learning rate \d.*: the loss fell steepest at", text_of(by_id["rate"]))
    assert re.search(r"batch size \d+ on each rank: ", text_of(by_id["batch"]))
    swept = text_of(by_id["sweep"])
    assert "spirals: finished · 5 of 5 trials" in swept and "best: valid_loss" in swept and "importance: " in swept
    pictures = [output.data["text/html"] for output in by_id["sweep"].outputs if "text/html" in output.get("data", {})]
    assert "Parallel coordinates of" in pictures[-1]
    assert "5 trials in the study" in text_of(by_id["best"])
    assert "7 of 7 trials" in text_of(by_id["more"])
    assert "bred: finished · 4 of 4 trials" in text_of(by_id["population"])
    assert re.findall(r"^(\d) (\d) from", text_of(by_id["bred"]), re.MULTILINE) == [*zip("0011", "0123", strict=True)]
    assert "logits" in text_of(by_id["serve"]) or "[" in text_of(by_id["serve"])
