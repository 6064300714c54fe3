"""Tensors of a collective to which ranks may give different numbers of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jupyter_llmcloud.training.preflight.rehearse import Journal, _watched

ROWS = torch.zeros(5, 2)


def _exchange(output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None) -> None:
    """As torch.distributed's all_to_all_single is called."""


@pytest.mark.parametrize(
    ("args", "shape"),
    [
        ((ROWS, ROWS, [2, 3], [4, 1]), ""),
        ((ROWS, ROWS), "float32 [5, 2]"),
        ((ROWS, ROWS, None, None), "float32 [5, 2]"),
    ],
    ids=["by split sizes", "in equal parts", "in equal parts, said so"],
)
def test_rows_that_are_exchanged_by_split_sizes_may_be_other_ones_on_each_rank(
    args: tuple[Any, ...], shape: str, tmp_path: Path
) -> None:
    # Tokens that a router sends to experts on other ranks: nothing is wrong where ranks have different numbers of them.
    journal = Journal(str(tmp_path / "journal"))
    _watched(journal, "all_to_all_single", _exchange)(*args)
    journal._file.close()
    assert json.loads((tmp_path / "journal").read_text().splitlines()[0])["shape"] == shape
