"""A run that is exported gives the same losses as a plain script, where this package cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

from jupyter_llmcloud.storage.runs import RunStore

pytestmark = pytest.mark.slow
DEFINITIONS = """%%distribute -n 2 --name definitions
import torch
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 8

def make_model():
    return torch.nn.Sequential(
        torch.nn.Linear(4, WIDTH), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(WIDTH, 1)
    )
"""
TRAINING = """%%distribute --seed 5 --name small --save model
from accelerate import Accelerator
import jupyter_llmcloud as lc

accelerator = Accelerator()
rows = torch.randn(64, 4)
loader = DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=4, shuffle=True)
model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=lr)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, (x, y) in enumerate(loader):
    loss = torch.nn.functional.mse_loss(model(x), y)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    assert not lc.run.should_stop
    accelerator.log({"loss": loss.item()}, step=step)
accelerator.end_training()
"""


@pytest.fixture
def kernel(own_root: Path) -> Iterator[BlockingKernelClient]:
    manager, client = start_new_kernel()
    run(client, "%load_ext jupyter_llmcloud")
    yield client
    run(client, "%cluster stop")
    client.stop_channels()
    manager.shutdown_kernel()


def run(client: BlockingKernelClient, code: str) -> str:
    """Execute a cell; returns what it printed, or the name and words of its error."""
    written: list[str] = []

    def note(message: Any) -> None:
        if message["msg_type"] == "stream":
            written.append(message["content"]["text"])

    content = client.execute_interactive(code, timeout=180, output_hook=note)["content"]
    return f"{content['ename']}: {content['evalue']}" if content["status"] == "error" else "".join(written)


def without_package(folder: Path) -> dict[str, str]:
    """An environment in which this package cannot be imported."""
    absent = folder / "absent"
    absent.mkdir()
    (absent / "jupyter_llmcloud.py").write_text("raise ImportError('it is not installed here')\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(absent), "OMP_NUM_THREADS": "1"}


def losses(lines: str) -> list[float]:
    return [json.loads(line)["loss"] for line in lines.splitlines() if line.startswith("{")]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
)


@pytest.mark.story
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(ACCELERATE, id="accelerate launch", marks=pytest.mark.soak),
    ],
)
def test_an_exported_run_gives_the_losses_of_the_run_under_a_launcher(
    kernel: BlockingKernelClient, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    script = tmp_path / "train.py"
    assert "Error" not in run(kernel, DEFINITIONS)
    run(kernel, "import jupyter_llmcloud as lc\nlr, table = 0.05, object()\n%push lr,table")
    assert "Error" not in run(kernel, TRAINING)
    told = run(kernel, f"%runs export small {script}")
    assert "torchrun --nproc-per-node 2" in told and "sbatch" in told, told

    folder = RunStore().find("small")
    expected = [record["values"]["loss"] for rank, record in folder.records("metrics") if rank == 0]
    assert len(expected) == 8 and len(set(expected)) == 8
    record = folder.read()
    assert record.pushed == {"lr": "0.05", "table": ""} and record.topology["hosts"] == [2]

    env = without_package(tmp_path)
    command = [*launcher, script.name]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert losses(ended.stdout) == expected, (ended.stdout, ended.stderr)
    assert (tmp_path / "model" / "model.pt").exists()

    assert "Reproduced: every value of loss is the same." in run(kernel, "print(repr(lc.runs.reproduce('small')))"), (
        "on the same ranks"
    )
    other = TRAINING.replace(
        "--seed 5 --name small --save model", f"--seed 6 --name other --export {tmp_path}/other.py"
    )
    assert "torchrun" in run(kernel, other) and "_seed(6)" in (tmp_path / "other.py").read_text(encoding="utf-8")
    compared = run(kernel, "print(repr(lc.runs.compare('small', 'other')))")
    assert "apart from step 0" in compared and "seed" in compared, compared
    run(kernel, "%%distribute --name uses-table\nkept = (table, lr)")
    assert "'table' was pushed from the notebook" in run(kernel, f"%runs export uses-table {script}")
