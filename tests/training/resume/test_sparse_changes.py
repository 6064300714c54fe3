"""What changes in few places between two checkpoints comes back whole, or the checkpoint is refused by name."""

from __future__ import annotations

import textwrap

import pytest

from tests.support.resumed_cells import BEGIN
from tests.support.resuming import notes, resumed
from tests.support.worlds import Ranks

CELL = (
    "DIE, BATCH = 21, 4\n"
    + "{common}"
    + BEGIN
    + """
import dataclasses, itertools
import pandas as pd
{setup}
for epoch in range(3):
    for i, x, y in loader:
        turn += 1
        train((i, x, y))
        at = turn * 997
        {step}
        perhaps_die(turn)
{result}
"""
)

# Each changes one element a step, of 36 steps. (setup, step, result, its value)
KEPT = {
    "statistics of examples": ("seen = torch.zeros(50_000)", "seen[at] += 1", "int(seen.sum())", 36),
    "rows of an array": ("rows = np.zeros(200_000)", "rows[at] = 1", "int(rows.sum())", 36),
    "a histogram of an object": (
        "class Meter:\n    def __init__(self): self.bins = np.zeros(1000)\nmeter = Meter()",
        "meter.bins[at % 1000] += 1",
        "int(meter.bins.sum())",
        36,
    ),
    "a memory bank": (
        "bank = nn.Module()\nbank.register_buffer('memory', torch.zeros(5_000, 8))",
        "bank.memory[at % 5_000] = 1",
        "float(bank.memory.sum())",
        36 * 8.0,
    ),
    "a long list": ("marks = [0] * 200_000", "marks[at] = 1", "sum(marks)", 36),
    "a name that begins with an underscore": ("_count = 0", "_count += 1", "_count", 36),
}

# What cannot be saved. (setup, step, name that is said)
REFUSED = {
    "a table": ("table = pd.DataFrame({'n': np.zeros(36)})", "table.loc[turn - 1, 'n'] = 1", "table"),
    "an object with slots": (
        "class Slotted:\n    __slots__ = ('n',)\nslotted = Slotted()\nslotted.n = 0",
        "slotted.n += 1",
        "slotted",
    ),
    "a counter of itertools": ("numbers = itertools.count()", "next(numbers)", "numbers"),
}


def cell(setup: str, step: str, result: str) -> str:
    from tests.support.resuming import COMMON

    filled = CELL.replace("{common}", COMMON).replace("{setup}", setup).replace("{result}", result)
    return textwrap.dedent(filled.replace("{step}", step))


@pytest.mark.parametrize("name", list(KEPT))
def test_a_sparse_change_is_not_lost_when_a_rank_is_killed(world: Ranks, name: str) -> None:
    setup, step, result, value = KEPT[name]
    outcome = world.ok(cell(setup, step, result), checkpoint_every=4, max_restarts=1)
    [note] = resumed(outcome)
    assert "resumed from step" in note
    assert outcome.results() == [repr(value)] * 2


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_has_changed_and_cannot_be_saved_is_refused_by_name(world: Ranks, name: str) -> None:
    setup, step, word = REFUSED[name]
    outcome = world.ok(cell(setup, step, "turn"), checkpoint_every=4, max_restarts=1)
    said = " ".join(notes(outcome))
    assert f"'{word}' has changed since the training began" in said
    assert "run.checkpoint" in said
    assert "executed again from its start" in said
    assert outcome.results() == ["36", "36"]
