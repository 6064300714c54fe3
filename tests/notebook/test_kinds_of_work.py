"""The notebooks about kinds of work run as a whole: each learns more than its baseline, and its endpoint answers as its model."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.leaks import REPOSITORY

NOTEBOOKS = REPOSITORY / "notebooks"
NAMES = ("text_classification", "images", "recommender")


def executed(name: str, folder: Path, parameters: str) -> dict[str, nbformat.NotebookNode]:
    """The cells by their ids, after the notebook has run with these parameters; its own assertions hold."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    by_id = {cell.id: cell for cell in notebook.cells}
    by_id["parameters"].source = parameters
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert "sk-llmc-" not in nbformat.writes(notebook), "a key is in the outputs"
    return by_id


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, and its value."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
    texts += [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    return "".join(texts)


def percentages(text: str) -> list[float]:
    """Every share that a text tells, in its order."""
    return [float(share) for share in re.findall(r"([\d.]+)%", text)]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_about_a_kind_of_work_is_saved_without_outputs(name: str) -> None:
    cells = [
        cell for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"
    ]
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("shared_server")
def test_a_trainer_learns_the_order_of_words(tmp_path: Path) -> None:
    cells = executed("text_classification", tmp_path, "num_reviews = 3000\nnum_epochs = 2")
    bert, regression, majority = percentages(printed(cells["baseline"]))
    assert bert > 85 and regression < 70 and majority < 60
    first, second, *_ = printed(cells["predict"]).splitlines()
    assert first.split()[0] == "content" and second.split()[0] == "unhappy", "the same words in another order"
    assert "'labels': ['content']" in printed(cells["request"])
    assert percentages(printed(cells["served"])) == [bert, bert]
    html = cells["explain"].outputs[-1].data["text/html"]
    assert "data:image/svg+xml;base64," in html and "They add up to" in html and "reviews answers “content”" in html
    scores = dict(ast.literal_eval(printed(cells["scores"])))
    assert len(scores) == 3 and {"not", "stale"} & set(scores)
    tried = printed(cells["tried"])
    assert re.search(r"^no capitals +[\d.]+% .* the same answers$", tried, re.M)
    assert re.search(r"^capitals +[\d.]+% .* loses [\d.]+ points$", tried, re.M) and "letters in any order" in tried


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("shared_server")
def test_a_convolutional_net_finds_shapes_wherever_they_are(tmp_path: Path) -> None:
    cells = executed("images", tmp_path, "num_pictures = 1600\nnum_epochs = 4")
    net, regression, majority = percentages(printed(cells["baseline"]))
    assert net > 75 and regression < 40 and majority < 35
    assert "image/png" in cells["predict"].outputs[0].data
    assert re.match(r"(\w+), drawn as a \w+\n", printed(cells["request"]))
    assert percentages(printed(cells["served"])) == [net, net]
    assert "data:image/png;base64," in cells["explain"].outputs[-1].data["text/html"]


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("shared_server")
def test_two_towers_find_more_songs_than_popularity_does(tmp_path: Path) -> None:
    cells = executed("recommender", tmp_path, "num_listeners = 2000\nnum_epochs = 12")
    towers, popularity, chance = percentages(printed(cells["baseline"]))
    assert towers > 1.3 * popularity and popularity > 3 * chance
    assert "32 numbers" in printed(cells["request"])
