"""A run goes on when its kernel is killed, and everything that was missed is shown again, in order, once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from jupyter_llmcloud.storage.runs import RunStore
from tests.support.worlds import until

NUM_LINES = 60
CELL = f"""%%distribute -n 2 --name survivor
import time
for i in range({NUM_LINES}):
    print("line", i, flush=True)
    run.log(loss=1 / (i + 1), step=i)
    time.sleep(0.1)
"""
ENDLESS = "%%distribute --name endless\nimport time\nwhile True:\n    run.log(x=1.0); time.sleep(0.01)"


class Kernel:
    """A notebook's kernel: cells in, their text out."""

    def __init__(self) -> None:
        self.manager: KernelManager
        self.client: BlockingKernelClient
        self.manager, self.client = start_new_kernel(kernel_name="python3")
        self.run("%load_ext jupyter_llmcloud")

    def run(self, code: str, timeout_s: float = 90) -> str:
        """Execute and wait; what was printed."""
        texts: list[str] = []

        def hear(message: dict) -> None:
            content = message["content"]
            texts.append(content.get("text", ""))
            texts.extend(content.get("traceback", []))

        reply = self.client.execute_interactive(code, timeout=timeout_s, output_hook=hear)
        assert reply["content"]["status"] == "ok", texts
        return "".join(texts)

    def kill(self) -> None:
        """As JupyterLab's Restart does: SIGKILL to the kernel's whole process group."""
        os.killpg(os.getpgid(self.manager.provisioner.pid), signal.SIGKILL)

    def end(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernels() -> Iterator[list[Kernel]]:
    started: list[Kernel] = []
    yield started
    for kernel in started:
        kernel.end()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_server")
def test_a_run_survives_its_killed_kernel_and_another_kernel_shows_all_of_it(kernels: list[Kernel]) -> None:
    """No line is missing, none is there twice, and the model's metrics go to the last step."""
    first = Kernel()
    kernels.append(first)
    first.client.execute(CELL)
    until(lambda: _num_metrics() > 10, "the run has begun", 90)
    first.kill()
    assert RunStore().find("survivor").read().state == "running"

    second = Kernel()
    kernels.append(second)
    shown = second.run("%runs attach survivor")
    assert RunStore().find("survivor").read().state == "finished"
    expected = "".join(f"[0-1] line {i}\n" for i in range(NUM_LINES))
    assert "".join(line + "\n" for line in shown.splitlines() if "line" in line) == expected
    assert _num_metrics() == NUM_LINES


def _num_metrics() -> int:
    runs = [record for record in RunStore().list() if record.name == "survivor"]
    if not runs:
        return 0
    records = RunStore().find("survivor").records("metrics")
    return sum(1 for rank, record in records if rank == 0 and "values" in record)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_server")
def test_stop_of_the_notebook_keeps_the_variables_of_the_kernel_and_of_the_ranks(kernels: list[Kernel]) -> None:
    """The Stop button sends SIGINT to the kernel's process group: only the run ends."""
    kernel = Kernel()
    kernels.append(kernel)
    kernel.run("%%distribute -n 2\nkept = rank + 1")
    asked = kernel.client.execute(ENDLESS, stop_on_error=False)
    until(lambda: any(run.name == "endless" and run.state == "running" for run in RunStore().list()), "it runs", 60)
    pressed = time.monotonic()
    os.killpg(os.getpgid(kernel.manager.provisioner.pid), signal.SIGINT)
    until(lambda: RunStore().find("endless").read().state == "stopped", "it has stopped", 8)
    reply = kernel.client._recv_reply(asked, timeout=8)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert time.monotonic() - pressed < 8
    assert sorted(kernel.run("%%distribute\nkept").splitlines()) == ["Out[0]: 1", "Out[1]: 2"]
