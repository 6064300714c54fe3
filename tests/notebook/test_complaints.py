"""What users of other distributed notebooks complain about, in a kernel that has been used before we came.

The complaints and the tests that answer them are listed in `tests.house.promises`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.storage.runs import RunStore
from tests.notebook.test_distribute_notebook import Notebook
from tests.support.worlds import Ranks, numbered_lines, until

pytestmark = [pytest.mark.story, pytest.mark.slow]

# A notebook that has trained alone: threads of OpenMP, a process group, an Accelerator, a device that was touched.
USED = """
import os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
import torch, torch.distributed as dist
torch.set_num_threads(2)
product = torch.randn(600, 600) @ torch.randn(600, 600)
if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from accelerate import Accelerator
accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = accelerator.prepare(torch.nn.Linear(4, 4))
kept = model
device, rank, run, loss, world_size = "mine", "mine", "mine", "mine", "mine"
"""
TRAIN = """%%distribute -n 2 --name trains
import torch
from accelerate import Accelerator
accelerator = Accelerator()
model, loss = torch.nn.Linear(4, 1), 0
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
for step in range(5):
    loss = model(torch.randn(8, 4, device=device)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
print("trained on", accelerator.num_processes, "ranks")"""
NUM_LINES = 60


@pytest.fixture(scope="module")
def notebook(shared_server: ServerClient) -> Iterator[Notebook]:
    notebook = Notebook()
    notebook.ok(USED)
    yield notebook
    notebook.end()


def test_a_notebook_that_has_used_torch_its_devices_and_a_process_group_can_distribute(notebook: Notebook) -> None:
    """ "Cannot re-initialize CUDA in forked subprocess" (accelerate#182 to #3925), "Accelerator already initialised"."""
    assert "trained on 2 ranks" in notebook.ok(TRAIN).text


def test_variables_of_the_notebook_are_never_overwritten_by_those_of_the_ranks(notebook: Notebook) -> None:
    notebook.ok("%%distribute\nproduct, new_name, device_of_rank = 1, rank, str(device)")
    assert notebook.ok("device, rank, run, loss, world_size").results == [str(("mine",) * 5)]
    assert notebook.ok("model is kept, tuple(product.shape)").results == ["(True, (600, 600))"]
    assert notebook.ok("'new_name' in globals()").results == ["False"]
    assert notebook.ok("dist.get_world_size(), accelerator.num_processes").results == ["(1, 1)"]
    assert notebook.ok("%%distribute\n(rank, world_size, torch.distributed.get_world_size())").text.count("2, 2)") == 2


def test_a_large_value_comes_back_and_a_large_result_is_no_burden(notebook: Notebook) -> None:
    """A value beyond what a pipe or a queue holds blocks launchers whose parent waits before it reads."""
    began = time.monotonic()
    notebook.ok("%%distribute --pull big,other\nimport numpy as np\nbig = np.arange(8_000_000.0)\nother = b'x' * 2**25")
    assert notebook.ok("float(big.sum()), len(other)").results == ["(31999996000000.0, 33554432)"]
    notebook.ok("%pull big@all")
    assert notebook.ok("[float(value[-1]) for value in big]").results == ["[7999999.0, 7999999.0]"]
    assert len(notebook.ok("%%distribute\nlist(range(10**6))").text) < 200_000
    assert time.monotonic() - began < 30


def test_a_rank_whose_messages_nobody_reads_goes_on(new_world: Callable[..., Ranks]) -> None:
    """20 MB straight to the file descriptors, from C and from a child, while the notebook reads nothing."""
    world = new_world()
    running = world.send(
        """
        import os, subprocess
        for _ in range(150):
            os.write(2, b"e" * 65535 + b"\\n")
            os.write(1, b"o" * 65535 + b"\\n")
        subprocess.run("head -c 2000000 /dev/zero | tr '\\\\0' 'c' >&2", shell=True, check=True)
        """
    )
    folder = running.outcome.folder
    until(lambda: (folder.path / "run.json").exists() and not folder.read().is_active, "it has ended unread", 60)
    assert folder.read().state == "finished"
    written = sum(len(record["text"]) for _, record in folder.records("logs") if record["kind"] == "stderr")
    assert written == 2 * (150 * 65536 + 2_000_000)
    assert running.end().state == "finished"


def test_output_of_a_cell_whose_browser_was_closed_is_shown_again_in_order_and_once(notebook: Notebook) -> None:
    """The kernel goes on, and so does the cell; a new tab knows nothing of what was sent to the old one."""
    cell = f"""%%distribute --name unseen
import time
for i in range({NUM_LINES}):
    print("line", i)
    run.log(x=i)
    time.sleep(0.05)"""
    notebook.client.execute(cell)
    until(lambda: any(record.name == "unseen" and record.state == "running" for record in RunStore().list()), "it runs")
    notebook.client.stop_channels()  # the tab is closed
    until(lambda: _num_lines("unseen") > 20, "it goes on")
    notebook.client = notebook.manager.client()
    notebook.client.start_channels()
    notebook.client.wait_for_ready(timeout=60)
    shown = notebook.ok("%runs attach unseen").text
    assert numbered_lines(shown) == {0: [*range(NUM_LINES)], 1: [*range(NUM_LINES)]}
    assert RunStore().find("unseen").read().state == "finished"


def _num_lines(name: str) -> int:
    return sum(record.get("text", "").count("line") for _, record in RunStore().find(name).records("logs"))


def test_a_cell_after_an_attach_still_finds_its_ranks(notebook: Notebook) -> None:
    assert notebook.ok("%%distribute\nnew_name").text.count("Out") == 2
