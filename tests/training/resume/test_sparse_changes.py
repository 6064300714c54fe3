"""What changes in few places between two checkpoints comes back whole, or the checkpoint is refused by name."""

from __future__ import annotations

import ast
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

NUM_STEPS = 36

# Each changes one element a step. (setup, step, result)
KEPT = {
    "statistics of examples": ("seen = torch.zeros(50_000)", "seen[at] += 1", "int(seen.sum())"),
    "rows of an array": ("rows = np.zeros(200_000)", "rows[at] = 1", "int(rows.sum())"),
    "a histogram of an object": (
        "class Meter:\n    def __init__(self): self.bins = np.zeros(1000)\nmeter = Meter()",
        "meter.bins[at % 1000] += 1",
        "int(meter.bins.sum())",
    ),
    "a memory bank": (
        "bank = nn.Module()\nbank.register_buffer('memory', torch.zeros(5_000, 8))",
        "bank.memory[at % 5_000] = 1",
        "float(bank.memory.sum())",
    ),
    "a long list": ("marks = [0] * 200_000", "marks[at] = 1", "sum(marks)"),
    "a name that begins with an underscore": ("_count = 0", "_count += 1", "_count"),
    "a table": (
        "table = pd.DataFrame({'n': np.zeros(36)})",
        "table.loc[turn - 1, 'n'] = 1",
        "int(table['n'].sum())",
    ),
    "an object with slots": (
        "class Slotted:\n    __slots__ = ('n',)\nslotted = Slotted()\nslotted.n = 0",
        "slotted.n += 1",
        "slotted.n",
    ),
    "a dataclass with slots": (
        "@dataclasses.dataclass(slots=True)\nclass Tally:\n    n: int = 0\ntally = Tally()",
        "tally.n += 1",
        "tally.n",
    ),
    "a class attribute": ("class Registry:\n    n = 0", "Registry.n += 1", "Registry.n"),
    "an attribute of a function": ("def f(): pass\nf.calls = 0", "f.calls += 1", "f.calls"),
    "a counter of itertools": ("numbers = itertools.count()", "next(numbers)", "next(numbers)"),
    "an array of objects": (
        "boxes = np.empty(50, dtype=object)\nfor box in range(50): boxes[box] = [0]",
        "boxes[turn % 50][0] += 1",
        "sum(box[0] for box in boxes)",
    ),
    "an object in a large dict": (
        "class Box:\n    def __init__(self): self.n = 0\nmany = {i: Box() for i in range(500)}",
        "many[at % 500].n += 1",
        "sum(box.n for box in many.values())",
    ),
    "a global of a helper module": (
        "import pathlib, sys, tempfile\nfolder = pathlib.Path(tempfile.mkdtemp())\n"
        "(folder / 'tally_helper.py').write_text('num = 0\\ndef count():\\n    global num\\n    num += 1\\n')\n"
        "sys.path.insert(0, str(folder))\nimport tally_helper",
        "tally_helper.count()",
        "tally_helper.num",
    ),
    "a variable of a closure": (
        "def make():\n    n = 0\n    def count():\n        nonlocal n\n        n += 1\n        return n\n"
        "    return count\ncount = make()",
        "count()",
        "count() - 1",
    ),
    "models that are made on the way": ("models = []", "models.append(nn.Linear(2, 1))", "len(models)"),
    "views of one array": (
        "base = np.zeros(20_000)\nhalf = base[::2]",
        "half[at % 10_000] += 1",
        "(int(base.sum()), int(half.sum()))",
    ),
    "an attribute of a trained parameter": (
        "for p in model.parameters(): p.hits = 0\nmodel.module[0].weight.register_hook(lambda grad: grad * 1)",
        "for p in model.parameters(): p.hits += 1",
        "next(model.parameters()).hits",
    ),
    "a name that begins with two underscores": ("__count = 0", "__count += 1", "__count"),
    "a name like one of the shell's": ("_i = 0", "_i += 1", "_i"),
    "an attribute of a tensor": ("mark = torch.zeros(1)\nmark.hits = 0", "mark.hits += 1", "mark.hits"),
    "what a hook has counted": (
        "def counting(layer):\n    n = 0\n    def hook(*_):\n        nonlocal n\n        n += 1\n"
        "        layer.calls = n\n    layer.register_forward_hook(hook)\n"
        "counted_layer = nn.Linear(1, 1)\ncounting(counted_layer)",
        "counted_layer(torch.zeros(1))",
        "counted_layer.calls",
    ),
    "an optimizer of one's own": (
        "class Own(torch.optim.Optimizer):\n    def step(self, closure=None): self.n = getattr(self, 'n', 0) + 1\n"
        "own = Own([nn.Parameter(torch.zeros(1))], {})\nacc_own = accelerator.prepare(Own([nn.Parameter(torch.zeros(1))], {}))",
        "own.step(); acc_own.optimizer.step()",
        "own.n + acc_own.optimizer.n",
    ),
    "a buffer of a trained model that is not persistent": (
        "accelerator.unwrap_model(model).register_buffer('bank', torch.zeros(50_000), persistent=False)",
        "accelerator.unwrap_model(model).bank[at] = 1",
        "int(accelerator.unwrap_model(model).bank.sum())",
    ),
    "a large batch that is written before it is read": (
        "total = 0.0",
        "big = torch.full((100_000,), float(turn))\n        total += float(big[0])",
        "total",
    ),
}
# What comes of them, where it is not the number of steps.
RESULTS = {
    "an optimizer of one's own": 2 * NUM_STEPS,
    "a memory bank": NUM_STEPS * 8.0,
    "views of one array": (NUM_STEPS, NUM_STEPS),
    "a large batch that is written before it is read": float(sum(range(NUM_STEPS + 1))),
}

# What cannot be saved. (setup, step, what is said of it)
REFUSED = {
    "a generator that is advanced by hand": (
        "numbers = (n for n in range(100))",
        "next(numbers)",
        "'numbers' is or holds a generator that has been advanced",
    ),
    "a cache of limited size": (
        "import functools\n@functools.lru_cache(maxsize=8)\ndef square(n): return n * n",
        "square(turn)",
        "'square' is or holds the results in a functools.lru_cache of limited size",
    ),
    "a file that is written": (
        "import tempfile\nlog = open(tempfile.mktemp(), 'w')",
        "log.write('.')",
        "'log' is or holds a file that was written to",
    ),
}


def cell(setup: str, step: str, result: str) -> str:
    from tests.support.resuming import COMMON

    filled = CELL.replace("{common}", COMMON).replace("{setup}", setup).replace("{result}", result)
    return textwrap.dedent(filled.replace("{step}", step))


def test_sparse_changes_of_every_kind_are_not_lost_when_a_rank_is_killed(world: Ranks) -> None:
    setups, steps, looks = zip(*KEPT.values(), strict=True)
    result = f"dict(zip({list(KEPT)}, ({', '.join(looks)})))"
    code = cell("\n".join(setups), "\n        ".join(steps), result)
    outcome = world.ok(code, checkpoint_every=4, max_restarts=1)
    [note] = resumed(outcome)
    assert "resumed from step" in note
    wanted = {name: RESULTS.get(name, NUM_STEPS) for name in KEPT}
    assert [ast.literal_eval(found) for found in outcome.results()] == [wanted] * 2


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_has_changed_and_cannot_be_saved_is_refused_by_name(world: Ranks, name: str) -> None:
    setup, step, refusal = REFUSED[name]
    code = cell(setup, step, "turn").replace("DIE, BATCH = 21", "DIE, BATCH = 13")  # no checkpoint to wait for
    outcome = world.ok(code, checkpoint_every=4, max_restarts=1)
    said = " ".join(notes(outcome))
    assert refusal in said
    assert "run.checkpoint" in said
    assert "executed again from its start" in said
    assert outcome.results() == [str(NUM_STEPS)] * 2


def test_an_iterator_that_is_drawn_from_beside_its_loop_is_missed_not_guessed(world: Ranks) -> None:
    code = cell("numbers, pairs = iter(range(200)), []", "", "len(pairs), sum(pairs)")
    code = code.replace("for epoch in range(3):\n", "for epoch in numbers:\n    if len(pairs) == 3: break\n")
    code = code.replace("    for i, x, y in loader:\n", "    pairs.append(next(numbers))\n    for i, x, y in loader:\n")
    outcome = world.ok(code, checkpoint_every=4, max_restarts=2)
    assert "executed again from its start" in " ".join(resumed(outcome))
    assert outcome.results() == ["(3, 9)"] * 2
