"""A warning names the line that plain Python names: our functions are not between a library and its caller."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.worlds import Ranks

CELL = """
import warnings
import torch
from accelerate import notebook_launcher
from torch.nn.parallel import DistributedDataParallel
model = torch.nn.Linear(2, 1)
DistributedDataParallel(model, check_reduction=True)  # of torch, through its constructor
def items():
    for i in range(2):
        warnings.warn("of a generator", stacklevel=2)
        yield i
for i in items():  # of a generator
    pass
def train():
    warnings.warn("of a launched function", stacklevel=2)
notebook_launcher(train)  # of a launched function
loss = model(torch.ones(2)).sum()
torch.autograd.backward(loss, grad_variables=torch.ones(()))  # of torch, through backward
def old():
    warnings.warn("of a deprecated one", DeprecationWarning, stacklevel=2)
notebook_launcher(old)  # of a deprecated one
"""


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}], ids=["plain", "tracked"])
def test_warnings_name_the_line_of_the_user(world: Ranks, options: dict[str, Any]) -> None:
    outcome = world.ok(CELL, **options)
    shown = re.findall(r"^/tmp/cell-\d+\.py:(\d+): (\w+): .*\n  (.*)\n", outcome.text(0, "stderr"), re.MULTILINE)
    lines = ["%%distribute", *CELL.strip("\n").splitlines()]
    wanted = [line.strip() for line in lines if "  # " in line]
    assert [line for _, _, line in shown] == wanted
    assert [lines[int(number) - 1].strip() for number, _, _ in shown] == wanted
    assert [kind for _, kind, _ in shown][-1] == "DeprecationWarning"  # shown only where __main__ is to blame


def test_an_error_that_passes_our_functions_still_shows_their_lines(world: Ranks) -> None:
    outcome = world.run("import accelerate\naccelerate.notebook_launcher(lambda: 1 / 0)")
    text = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(outcome.error["traceback"]))
    assert "return function(*args)" in text
    assert "jupyter_llmcloud/training/integrations/launchers.py" in text
