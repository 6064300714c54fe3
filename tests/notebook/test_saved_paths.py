"""A saved notebook is shared and published: nothing in it tells where on a machine it was made."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytest_plugins = ["tests.support.server_fixtures"]
CHECKOUT = Path(__file__).resolve().parents[2]

CELLS = [
    "%load_ext jupyter_llmcloud",
    "%%distribute -n 2 --name poet --save model\n"
    "import torch, warnings\n"
    "warnings.warn('as from a script')\n"
    "torch.nn.functional.softmax\n"
    "from transformers import LlamaConfig, LlamaForCausalLM\n"
    "model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,"
    " num_attention_heads=2, num_key_value_heads=2))",
    "%%distribute\ntorch.nn.Linear(4, 4)(torch.ones(3))",
    "%%distribute\nimport json\njson.loads('{')",
    "%%distribute\nimport does_not_exist",
    "%%distribute\nopen('/nowhere/at/all')",
    "%%distribute\nfor i in range(30000):\n    print(rank, i, 'x' * 40)",
    "%runs logs --tail 3 poet",
    "%runs",
    "%runs show poet",
    "%world",
    "%world stacks",
    "%cluster",
    "%serve poet",
    "%serve ./no-such-folder",
    "%serve {model} --name tiny",
    "%serve {broken} --name broken",
    "%endpoints",
    "%endpoints logs broken",
    "%endpoints stop tiny",
    "import jupyter_llmcloud as lc\nlc.serve('{model}', dtype='int3')",
    "lc.distribute('1/0')",
    "lc.runs.show('nothing')",
]


@pytest.mark.story
@pytest.mark.slow
def test_a_saved_notebook_holds_no_absolute_path_but_what_was_typed_and_printed(
    headless_root: Path, real_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = str(tmp_path.parents[2])  # where the folder of all tests is
    monkeypatch.setenv("TMPDIR", temporary)
    broken = tmp_path / "broken"
    shutil.copytree(real_model, broken)
    (broken / "config.json").write_text(
        (broken / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    cells = []
    for source in CELLS:
        filled = source.replace("{model}", str(real_model)).replace("{broken}", str(broken))
        cells.append(nbformat.v4.new_code_cell(filled))
    notebook = nbformat.v4.new_notebook(cells=cells)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    NotebookClient(
        notebook, timeout=200, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        cell.source = ""
    saved = nbformat.writes(notebook)
    private = [Path.home(), CHECKOUT, headless_root, tmp_path, folder, temporary, os.path.realpath(temporary)]
    found = {path: saved[max(0, at - 200) : at + 200] for path in map(str, private) if (at := saved.find(path)) >= 0}
    assert not found, "\n\n".join(f"{path}: {text}" for path, text in found.items())
    for shown in (
        "<cell>:3: UserWarning: as from a script",
        "File \\u001b[39m\\u001b[32msite-packages/torch/nn/modules/module.py",
        "python3.11/json" if sys.version_info[:2] == (3, 11) else "/json",
        "$LLMCLOUD_ROOT/runs/poet-",
        "there is no folder 'no-such-folder'",
        "$TMPDIR/…/broken lacks 9 of the model's weights",
    ):
        assert shown in saved, shown
