"""What a library keeps in the process ends with the cell that made it; the variables of the cell stay."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.worlds import Ranks

MODEL = """
import torch
torch.manual_seed(0)
net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
"""
HALF_A_WINDOW = (
    "from accelerate import Accelerator\n"
    + MODEL
    + """
first = Accelerator(gradient_accumulation_steps=4)
net, optimizer = first.prepare(net, optimizer)
with first.accumulate(net):
    first.backward(net(torch.ones(2, 4)).sum())
    optimizer.step()
print(first.sync_gradients)
"""
)
THREE_STEPS = (
    MODEL
    + """
from accelerate import Accelerator
before = net.weight.detach().clone()
accelerator = Accelerator()
net, optimizer = accelerator.prepare(net, optimizer)
for _ in range(3):
    optimizer.zero_grad()
    accelerator.backward(net(torch.ones(1, 4)).sum())
    optimizer.step()
torch.allclose(net.module.weight, before - 0.3)
"""
)
MICRO_BATCHES = """
stepped = []
for _ in range(8):
    with {name}.accumulate(net):
        {name}.backward(net(torch.ones(2, 4)).sum())
        stepped.append({name}.sync_gradients)
        optimizer.step()
        optimizer.zero_grad()
"""


def test_an_accelerator_steps_after_a_cell_that_ended_inside_a_window(world: Ranks) -> None:
    assert world.ok(HALF_A_WINDOW).text(0) == "False\n"
    assert world.ok(THREE_STEPS).results() == ["True", "True"]


def test_an_optimizer_of_bare_accelerate_steps_after_a_cell_that_failed_inside_a_window(world: Ranks) -> None:
    assert world.run(HALF_A_WINDOW + "raise ValueError").state == "failed"
    assert world.ok("first.sync_gradients").results() == ["True", "True"]
    assert world.ok(THREE_STEPS).results() == ["True", "True"]


def test_an_accelerator_of_an_earlier_cell_goes_on_in_its_window(world: Ranks) -> None:
    world.ok(HALF_A_WINDOW)
    outcome = world.ok(MICRO_BATCHES.format(name="first") + "stepped")  # one of four was made in the cell before
    assert outcome.results() == [str([False, False, True, False, False, False, True, False])] * 2


def test_an_accelerator_keeps_its_number_of_steps_when_a_later_cell_makes_another(world: Ranks) -> None:
    world.ok(HALF_A_WINDOW + "first.step = 0")
    world.ok("second = Accelerator(gradient_accumulation_steps=2)\nnet, optimizer = second.prepare(net, optimizer)")
    every_fourth = str([False, False, False, True] * 2)
    assert world.ok(MICRO_BATCHES.format(name="first") + "stepped").results() == [every_fourth] * 2
    assert world.ok(MICRO_BATCHES.format(name="second") + "stepped").results() == [str([False, True] * 4)] * 2
    world.ok("first.gradient_accumulation_steps, first.backward(net(torch.ones(2, 4)).sum())")
    assert world.ok("first.step = 0\n" + MICRO_BATCHES.format(name="first") + "stepped").results() == [every_fourth] * 2


LOADER = """
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
accelerator = Accelerator()
loader = accelerator.prepare(DataLoader(TensorDataset(torch.arange(9.0)), batch_size=4))
"""


def test_a_loader_that_was_left_does_not_count_in_the_next_cell(world: Ranks) -> None:
    world.ok(LOADER + "for number, (x,) in enumerate(loader):\n    if number == 1: break\n")
    gathered = "len(accelerator.gather_for_metrics(torch.ones(4)))"
    assert world.ok(gathered).results() == ["8", "8"]  # the left loader's last batch was short


def test_a_loader_that_a_variable_iterates_goes_on_in_the_next_cell(world: Ranks) -> None:
    world.ok(LOADER + "batches = iter(loader)\nx = next(batches)[0]")
    outcome = world.ok("x = next(batches)[0]\nlen(accelerator.gather_for_metrics(x))")
    assert outcome.results() == ["1", "1"]  # nine values less the eight of the first batches


@pytest.mark.parametrize(
    "plugin",
    [
        "from accelerate import FullyShardedDataParallelPlugin\nAccelerator(fsdp_plugin=FullyShardedDataParallelPlugin())",
        "from accelerate import DeepSpeedPlugin\nAccelerator(deepspeed_plugin=DeepSpeedPlugin())",
    ],
    ids=["FSDP", "DeepSpeed"],
)
def test_the_environment_that_a_plugin_has_written_ends_with_its_cell(world: Ranks, plugin: str) -> None:
    keep = "kept = {k: v for k, v in os.environ.items() if k.startswith(('ACCELERATE_', 'FSDP_', 'DEEPSPEED_'))}"
    world.ok("import os\nfrom accelerate import Accelerator\n" + keep)
    written = world.run(f"{plugin}")
    assert written.state == "finished" or "deepspeed" in written.error["evalue"].lower()
    assert world.ok(keep.replace("kept", "now") + "\nnow == kept").results() == ["True", "True"]
    assert world.ok(THREE_STEPS).results() == ["True", "True"]


def test_the_environment_that_a_cell_sets_itself_stays(world: Ranks) -> None:
    world.ok("import os\nos.environ['ACCELERATE_USE_XYZ'] = '1'\nos.environ.update(FSDP_MINE='2')\n%env PL_MINE=3")
    mine = "[os.environ.get(name) for name in ('ACCELERATE_USE_XYZ', 'FSDP_MINE', 'PL_MINE')]"
    assert world.ok(mine).results() == ["['1', '2', '3']"] * 2
    world.ok("for name in ('ACCELERATE_USE_XYZ', 'FSDP_MINE', 'PL_MINE'): del os.environ[name]")
    assert world.ok(mine).results() == ["[None, None, None]"] * 2


def test_signal_handlers_and_timers_of_a_cell_end_with_it(world: Ranks) -> None:
    world.ok(
        """
        import signal
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGINT):
            signal.signal(number, lambda *_: print("mine"))
        signal.alarm(100)
        """
    )
    now = "[signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)] == before"
    assert world.ok(now + ", signal.alarm(0)").results() == ["(True, 0)"] * 2
    os.kill(world.pids()[0], signal.SIGTERM)
    assert world.run("import time\ntime.sleep(20)").state == "failed"  # as of a rank that nobody has told otherwise
