"""A cell that fails leaves no batches, models or activations behind, and is still explained."""

from __future__ import annotations

import psutil
import pytest

from tests.support.worlds import Ranks, until

MIB = 1 << 20
MOST_LEFT = 40 * MIB
SETUP = (
    "import torch\nfrom torch import nn\nfrom torch.nn.parallel import DistributedDataParallel\nkept = []\n"
    "nn.Linear(500, 500)(torch.ones(4000, 500)).relu().sum().backward()\n"  # torch makes its threads and caches once
)
BIG = "torch.ones(100 << 20, dtype=torch.uint8)"
FAILURES = {
    "local variables": f"def step(n):\n    batch = {BIG}\n    raise ValueError('x')\nstep(1)",
    "a circle": f"class A: pass\ndef step():\n    a = A()\n    a.me, a.big = a, {BIG}\n    1 / 0\nstep()",
    "what an error came from": (
        f"def inner():\n    batch = {BIG}\n    1 / 0\n"
        "def outer():\n    try: inner()\n    except ZeroDivisionError as e: raise RuntimeError('on') from e\nouter()"
    ),
    "an error in a forward pass": (
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.l = nn.Linear(500, 500)\n"
        "    def forward(self, x):\n        return self.l(x).relu() @ torch.ones(3, 3)\n"
        "net = Net()\ndef step():\n    return net(torch.ones(25_000, 500))\nstep()"
    ),
    "a model that is half made": (
        "def make():\n    model = DistributedDataParallel(nn.Linear(4000, 4000))\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)\n    raise ValueError('x')\nmake()"
    ),
    "a generator": f"def batches():\n    big = {BIG}\n    yield 1\n    raise ValueError('x')\nfor _ in batches(): pass",
    "an error that the cell keeps": (
        f"def step():\n    batch = {BIG}\n    raise ValueError('x')\ntry:\n    step()\nexcept ValueError as e:\n    kept[:] = [e]\n    raise"
    ),
    "an error that holds it": f"class Own(Exception): pass\ndef step():\n    raise Own({BIG})\nstep()",
    "a group of errors": (
        f"def inner():\n    batch = {BIG}\n    1 / 0\ndef outer():\n    try: inner()\n"
        "    except ZeroDivisionError as e: raise ExceptionGroup('g', [e]) from None\nouter()"
    ),
    "many small tensors": "def step():\n    many = [torch.ones(256) + i for i in range(40_000)]\n    raise ValueError('x')\nstep()",
    "a stop of its own": f"def step():\n    batch = {BIG}\n    raise KeyboardInterrupt\nstep()",
}


def in_use(world: Ranks) -> int:
    return max(psutil.Process(pid).memory_info().rss for pid in world.pids())


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=name, marks=[pytest.mark.story] * name.startswith("many"))
        for name, code in FAILURES.items()
    ],
)
def test_five_failures_leave_no_memory_behind(world: Ranks, code: str) -> None:
    world.ok(SETUP)
    before = in_use(world)
    for _ in range(5):
        assert world.run(code).state == "failed"
    world.ok("pass")
    until(lambda: in_use(world) - before < MOST_LEFT, "the memory is given back", 10)


def test_a_failure_still_tells_its_variables_its_line_and_its_traceback(world: Ranks) -> None:
    world.ok("kept = []")
    outcome = world.run(
        """
        def step(batch_size):
            loss = batch_size * 2
            raise ValueError("too large")
        try:
            step(8)
        except ValueError as error:
            kept.append(error)
            raise
        """
    )
    assert outcome.error["locals"] == {"batch_size": "8", "loss": "16"}
    assert "line 4 in step" in outcome.error["place"]
    again = world.ok("%tb")
    assert "too large" in again.text(0, "stderr") + again.text(0)
    shown = world.ok("import traceback\nprint(''.join(traceback.format_exception(kept[0])))").text(0)
    assert "in step" in shown and 'raise ValueError("too large")' in shown
