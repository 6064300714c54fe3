"""A model served from a notebook, with nothing but a kernel: as papermill runs it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jupyter_llmcloud.client.rest import ServerClient

pytest_plugins = ["tests.support.server_fixtures"]

CELLS = [
    "%load_ext jupyter_llmcloud",
    "ep = %serve {model} --name tiny",
    "ep",
    "from openai import OpenAI\n"
    "client = OpenAI(base_url=ep.base_url, api_key=ep.api_key)\n"
    "client.completions.create(model='tiny', prompt='The for', max_tokens=4).usage.completion_tokens",
    "len(list(ep.chat('hello', stream=True, max_tokens=4))) > 0",
    "%endpoints",
    "%endpoints keys",
    "%serve {model} --name tiny",
    "%endpoints stop tiny",
]


@pytest.mark.slow
def test_a_notebook_serves_a_model_and_its_file_holds_no_key(shared_server: ServerClient, real_model: Path) -> None:
    cells = [nbformat.v4.new_code_cell(cell.replace("{model}", str(real_model))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=150, kernel_name="python3").execute()

    outputs = [cell.outputs for cell in notebook.cells]
    assert len(outputs[1]) == 1 and "$LLMCLOUD_API_KEY" in outputs[1][0].data["text/html"]
    assert len(outputs[2]) == 1 and "llmcloud/v1" in outputs[2][0].data["text/html"]
    assert outputs[3][0].data["text/plain"] == "4"
    assert outputs[4][0].data["text/plain"] == "True"
    assert any(
        "llmcloud/v1" in shown.get("data", {}).get("text/html", "") for shown in outputs[7]
    )  # it serves it already
    assert "sk-llmc-" not in nbformat.writes(notebook)
