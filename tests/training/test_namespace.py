"""Variables of a rank as rows: by name, type and size, without secrets and without reading tensors."""

from __future__ import annotations

import numpy as np
import torch

from jupyter_llmcloud.training.shell.namespace import rows


class Loud:
    """Says something when it is printed."""

    def __repr__(self) -> str:
        raise AssertionError("code of a value was run")


def test_variables_are_told_largest_first_with_what_they_hold() -> None:
    model = torch.nn.Linear(10, 10)
    found = rows({"x": 3, "model": model, "data": np.zeros(1000), "rank": 0, "_hidden": 1, "torch": torch}, {"rank"})
    assert [row["name"] for row in found] == ["data", "model", "x"]
    assert [row["num_bytes"] for row in found] == [8000, 440, None]
    assert found[2] == {"name": "x", "type": "int", "text": "3", "num_bytes": None, "role": ""}


def test_a_tensor_is_told_by_its_shape_alone_and_a_secret_is_masked() -> None:
    found = {row["name"]: row for row in rows({"t": torch.ones(2, 3), "api_token": "abcdefghijk", "loud": Loud()}, ())}
    assert found["t"]["text"] == "(2, 3) float32 on cpu" and found["t"]["num_bytes"] == 24
    assert "abcdef" not in found["api_token"]["text"]
    assert found["loud"]["type"] == "Loud"


def test_an_optimizer_counts_its_state() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    [row] = rows({"optimizer": optimizer}, ())
    assert row["num_bytes"] == 2 * 80 + 2 * 4  # two moments of each parameter, and a step
