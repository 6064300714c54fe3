"""Jupyter interrupts a kernel before it ends it: a restart or a shutdown is no Stop, and a Stop still is one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_llmcloud.client.stop_signal import StopSignal
from jupyter_llmcloud.magics.session.kernel_end import HOLD_S, KernelEnd
from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from tests.support.notebook_server import Notebook, NotebookServer, notebook_server
from tests.support.worlds import until

LET_GO = "let-go"  # a file beside the notebook: the training ends once it is there
TRAINING = f"""%%distribute -n 2 --name NAME
import os, time, torch
import torch.distributed as dist
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
i, ends = 0, torch.zeros(1)
while not ends:
    model(torch.ones(2, 4)).mean().backward()
    dist.all_reduce(model.weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    run.log(loss=1 / (i + 1), step=i)
    i += 1
    ends += os.path.exists("{LET_GO}")
    dist.all_reduce(ends)
    time.sleep(0.05)
print("ended after", i, "steps")
"""


@pytest.fixture(scope="module")
def server(module_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookServer]:
    """With the long lease that notebooks have outside of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCLOUD_LEASE_S", "600")
        with notebook_server(tmp_path_factory.mktemp("server") / "project") as server:
            yield server


def training(name: str) -> str:
    return TRAINING.replace("NAME", name)


def record(name: str) -> RunRecord:
    return RunStore().find(name).read()


def begun(notebook: Notebook, name: str) -> None:
    notebook.begin(training(name))
    until(lambda: num_steps(name), "the run has begun", 90)


def num_steps(name: str) -> int:
    if not any(run.name == name for run in RunStore().list()):
        return 0
    return sum("values" in values for rank, values in RunStore().find(name).records("metrics") if rank == 0)


@pytest.mark.story
@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "name"),
    [("restart", "restarted"), ("shut down and open again", "opened-again")],
)
def test_a_run_goes_on_when_its_kernel_is_ended_and_is_found_again(server: NotebookServer, end: str, name: str) -> None:
    notebook = server.open(f"{name}.ipynb")
    begun(notebook, name)
    if end == "restart":
        notebook.restart()
    else:
        notebook.shut_down()
        notebook = server.open(f"{name}.ipynb")
    assert record(name).state == "running"
    found = notebook.ok("%world").text
    assert "was still there" in found and f"%runs attach {name}-" in found
    (server.folder / LET_GO).touch()
    shown = notebook.ok(f"%runs attach {name}", timeout_s=120)
    (server.folder / LET_GO).unlink()
    assert record(name).state == "finished"
    assert f"ended after {num_steps(name)} steps" in shown.text
    assert "(2, 1)" in notebook.ok("%%distribute\n(world_size, model.out_features)").text
    notebook.ok("%world stop")


@pytest.mark.story
@pytest.mark.slow
def test_the_notebooks_stop_is_still_a_stop_and_a_stopped_run_is_shown_as_one(server: NotebookServer) -> None:
    notebook = server.open("stopped.ipynb")
    begun(notebook, "stopped")
    pressed = time.monotonic()
    notebook.interrupt()
    until(lambda: record("stopped").state == "stopped", "the run has stopped", 8)
    assert time.monotonic() - pressed < 2 + HOLD_S
    notebook.restart()
    assert f"Run {record('stopped').run_id} was stopped after" in notebook.ok("%runs attach stopped").text
    notebook.ok("%world stop")


class Kernel:
    """As far as its end is watched."""

    def do_shutdown(self, restart: bool) -> dict[str, bool]:
        return {"restart": restart}


class Shell:
    def __init__(self) -> None:
        self.kernel = Kernel()


def test_without_a_kernel_a_press_is_a_stop_at_once() -> None:
    with StopSignal(KernelEnd().explains_press) as stop:
        began = time.monotonic()
        stop._press(2, None)
        assert time.monotonic() - began < HOLD_S
        assert stop.presses == 1


def test_a_press_is_a_stop_unless_the_kernel_is_asked_to_end_within_a_moment() -> None:
    end, shell, told = KernelEnd(), Shell(), []
    end.watch(shell, told.append)
    end.watch(shell, lambda restart: pytest.fail("it is watched once"))
    with StopSignal(end.explains_press) as stop:
        began = time.monotonic()
        stop._press(2, None)
        assert time.monotonic() - began >= HOLD_S
        assert (stop.presses, stop.is_leaving) == (1, False)
        assert shell.kernel.do_shutdown(True) == {"restart": True}
        stop._press(2, None)
        stop._press(2, None)
        assert (stop.presses, stop.is_leaving) == (1, True)
    assert told == [True]
    assert "restarted" in end.message
