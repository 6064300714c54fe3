"""Tab in a real kernel: what there is, by its names; and the words after a save and a mistyped verb."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_llmcloud.cluster.factory import KINDS
from jupyter_llmcloud.core.spec import CLUSTER_KINDS
from tests.support.notebook_server import Notebook, NotebookServer, notebook_server


def test_the_kinds_of_clusters_are_those_that_can_be_made() -> None:
    assert list(CLUSTER_KINDS) == list(KINDS)


@pytest.fixture
def server(own_root: Path, tmp_path: Path) -> Iterator[NotebookServer]:
    with notebook_server(tmp_path / "project") as server:
        yield server


def tab(notebook: Notebook, line: str) -> list[str]:
    """What Tab offers at the end of a line."""
    reply = notebook.client.complete(line, len(line), reply=True, timeout=20)
    return list(reply["content"]["matches"])


SAVES = """%%distribute -n 2 --name trained --save model
import torch
model = torch.nn.Linear(1000, 1000)
for parameter in model.parameters():
    torch.distributed.broadcast(parameter.data, 0)
mine = 1
"""


@pytest.mark.story
@pytest.mark.slow
def test_tab_offers_names_of_what_there_is_and_a_save_says_what_it_saved(server: NotebookServer) -> None:
    notebook = server.open("a.ipynb")
    assert "trained" not in tab(notebook, "%runs attach ")
    assert "mine" not in tab(notebook, "%pull mi")  # nothing is started for it
    assert server.ask("GET", "llmcloud/api/clusters")["clusters"] == []
    notebook.ok("own_variable = 3")
    said = notebook.ok(SAVES).text
    assert "Saved model of the run trained (4.0 MB): %serve trained serves it." in said
    assert "Saved model" in notebook.ok("%runs attach trained").text + str(notebook.ok("%runs show trained").results)
    key = notebook.ok("k = %endpoints keys create --label mine\nprint(k.id)").text.strip()

    assert tab(notebook, "%cluster st") == ["start", "stop"]
    assert {"local", "slurm", "kubernetes"} <= set(tab(notebook, "%cluster start "))
    assert tab(notebook, "%cluster start --workers 2 kub") == ["kubernetes"]
    assert tab(notebook, "%cluster stop ") == ["local"]
    assert tab(notebook, "%cluster scale 3 --name lo") == ["local"]
    assert tab(notebook, "%runs show tr")[0] == "trained"
    assert "trained" not in tab(notebook, "%runs stop tr")  # none is active
    assert tab(notebook, "%%distribute --resume tr")[0] == "trained"
    assert tab(notebook, "%serve tr")[0] == "trained"
    assert tab(notebook, "%pull mi") == ["mine"]
    assert tab(notebook, "%%distribute --save model,mi") == ["model,mine"]
    assert tab(notebook, "%push own") == ["own_variable"]
    [world] = server.worlds()
    assert tab(notebook, "%world stop ") == [world["world_id"]]
    assert key in tab(notebook, "%endpoints keys revoke ")
    assert tab(notebook, "%endpoints keys re") == ["revoke"]

    for line, words in {
        "%runs atach x": "Did you mean attach?",
        "%cluster lst": "Did you mean list?",
        "%world restrat": "Did you mean restart?",
        "%endpoints stopp x": "Did you mean stop?",
        "%endpoints keys revok x": "Did you mean revoke?",
    }.items():
        assert words in notebook.run(line).error
