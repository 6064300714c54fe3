"""An installation whose parts do not fit together still runs cells that do not need those parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import importlib.util, torch
from jupyter_llmcloud.system import patching
from jupyter_llmcloud.training import model_imports
model_imports.import_models()
from transformers import BertConfig, BertModel
BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
print(importlib.util.find_spec("torchvision") is not None, patching.take_notices())
"""


@pytest.mark.soak
def test_models_are_imported_beside_a_torchvision_that_does_not_fit_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True, timeout=200
    )
    assert ran.stdout.startswith(
        "True ['torchvision is here and cannot be imported (RuntimeError: operator torchvision::nms"
    )
    assert "Install the build that fits torch" in ran.stdout
