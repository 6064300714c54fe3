"""Sweeps on real ranks: warm, alike on every rank, apart from each other; a killed rank, a killed kernel, a killed server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from jupyter_llmcloud import config
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.storage.search.sweeps import SweepStore
from tests.support.headless import headless_server
from tests.support.worlds import until

pytest.importorskip("optuna")
# Of trial 1 a rank is killed when it runs first; trials from 2 on would never end, and are worse.
CELL = """\
import os, pathlib, signal, torch
import torch.distributed as dist
assert "found_before" not in globals() and "MARK" not in os.environ
found_before, os.environ["MARK"] = True, "1"
lr = trial.suggest_float("lr", 0.0, 1.0)
kind = trial.suggest_categorical("kind", ["a", None])
folder = pathlib.Path(FOLDER)
seen = [None] * world_size
dist.all_gather_object(seen, (lr, kind, os.getpid(), trial.number))
if rank == 0:
    (folder / f"seen-{trial.number}").write_text(repr(seen))
if trial.number == 1 and rank == 1 and not (folder / "killed").exists():
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([weight], lr=0.0)
steps = 0
try:
    while steps < 5 or trial.number > 1:
        (weight * 1.0).sum().backward()
        dist.all_reduce(weight.grad)
        steps += 1
        run.log({"valid_loss": [1.0, 0.5, 3.0, 4.0][trial.number]}, step=steps)
        optimizer.step()
finally:
    (folder / f"steps-{trial.number}-{rank}").write_text(str(steps))
"""


def ended(server: ServerClient, name: str, timeout_s: float = 120) -> dict[str, Any]:
    """The sweep, once it has ended."""
    return until(lambda: (told := server.sweep(name))["state"] != "running" and told, f"{name} ends", timeout_s)


@pytest.mark.slow
def test_trials_run_on_warm_ranks_which_agree_and_forget(shared_server: ServerClient, tmp_path: Path) -> None:
    options = {"nproc": 2, "trials": 4, "metric": "valid_loss", "prune": "asha,min=1,reduction=2", "seed": 1}
    source = CELL.replace("FOLDER", repr(str(tmp_path)))
    shared_server.start_sweep(source=source, name="warm", **options)
    told = ended(shared_server, "warm")
    assert (told["state"], told["reason"]) == ("finished", "")
    assert [trial["state"] for trial in told["trials"]] == ["done", "done", "pruned", "pruned"]
    assert [trial["num_attempts"] for trial in told["trials"]] == [1, 2, 1, 1]
    seen = [eval((tmp_path / f"seen-{number}").read_text()) for number in range(4)]
    for number, ranks in enumerate(seen):
        assert len({rank[:2] for rank in ranks}) == 1 and {rank[3] for rank in ranks} == {number}
        assert told["trials"][number]["params"] == {"lr": ranks[0][0], "kind": ranks[0][1]}
    assert [rank[2] for rank in seen[1]] == [rank[2] for rank in seen[2]] == [rank[2] for rank in seen[3]]
    for number in range(4):
        assert len({(tmp_path / f"steps-{number}-{rank}").read_text() for rank in range(2)}) == 1
    assert told["best"]["number"] == 1 and told["best"]["value"] == 0.5
    run = shared_server.run("warm-0002")
    assert run["state"] == "stopped" and run["world_size"] == 2 and run["spec"]["fresh"]
    until(lambda: not shared_server.worlds(), "its ranks are given back")


# Trial 3 loses a rank when it runs first. Each turn notes the sum of its weights as it begins and as it ends.
POPULATION_CELL = """\
import os, pathlib, signal, torch
from accelerate import Accelerator
lr = trial.suggest_float("lr", 0.01, 0.1, log=True)
accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
model, optimizer = accelerator.prepare(model, optimizer)
kept = trial.restore(model=model, optimizer=optimizer)
total = lambda: sum(p.sum().item() for p in model.parameters())
begins = total()
for step in range(3):
    loss = (model(torch.ones(2, 4)) - 3).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
folder = pathlib.Path(FOLDER)
if trial.number == 3 and rank == 1 and not (folder / "killed").exists():
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
trial.save(model=model, optimizer=optimizer, steps=kept.get("steps", 0) + 3)
rate = optimizer.param_groups[0]["lr"]
(folder / f"seen-{trial.number}-{rank}").write_text(repr((begins, total(), kept, rate == lr)))
trial.report(loss.item(), step)
"""


@pytest.mark.slow
def test_the_members_of_a_population_train_on_from_each_others_weights(
    shared_server: ServerClient, tmp_path: Path
) -> None:
    source = POPULATION_CELL.replace("FOLDER", repr(str(tmp_path)))
    shared_server.start_sweep(source=source, name="bred", nproc=2, trials=4, prune="pbt,population=2", seed=1)
    told = ended(shared_server, "bred")
    assert (told["state"], told["reason"]) == ("finished", "")
    trials = told["trials"]
    assert [trial["generation"] for trial in trials] == [0, 0, 1, 1] and trials[3]["num_attempts"] == 2
    best = min(trials[:2], key=lambda trial: float(trial["value"]))
    assert [trial["parent"] for trial in trials] == [None, None, best["number"], best["number"]]
    seen = [[eval((tmp_path / f"seen-{number}-{rank}").read_text()) for rank in range(2)] for number in range(4)]
    for number, ranks in enumerate(seen):
        assert ranks[0] == ranks[1] and ranks[0][3]
        if (parent := trials[number]["parent"]) is not None:
            assert ranks[0][0] == seen[parent][0][1] and ranks[0][2] == {"steps": 3}
    assert trials[2]["params"] != trials[3]["params"] and best["params"] in (trials[2]["params"], trials[3]["params"])


@pytest.mark.soak
def test_what_a_sweep_is_stopped_with_is_gone_on_with(shared_server: ServerClient) -> None:
    source = (
        "import time\nx = trial.suggest_float('x', 0, 1)\nwhile trial.number == 1 and EVER:\n    time.sleep(0.01)\n"
    )
    source += "trial.report(x, 1)"
    shared_server.start_sweep(source=source.replace("EVER", "True"), name="halted", nproc=1, trials=3)
    until(lambda: len(shared_server.sweep("halted")["trials"]) == 2, "its second trial runs", 60)
    shared_server.stop_sweep("halted")
    told = ended(shared_server, "halted")
    assert (told["state"], [trial["state"] for trial in told["trials"]]) == ("stopped", ["done", "stopped"])
    shared_server.start_sweep(source=source.replace("EVER", "False"), name="halted", resume=True)
    told = ended(shared_server, "halted")
    assert [trial["state"] for trial in told["trials"]] == ["done", "stopped", "done", "done"]
    assert told["trials"][0]["value"] == told["trials"][0]["params"]["x"]


SLOW_CELL = """\
%%sweep -n 1 --trials {trials} --metric loss --name {name}
import time
x = trial.suggest_float("x", 0, 1)
for step in range(5):
    run.log(loss=x + 1 / (step + 1), step=step)
    time.sleep(0.1)
"""


@pytest.fixture
def kernel() -> Iterator[Any]:
    """Of a notebook that finds its server by the environment."""
    manager, client = start_new_kernel(kernel_name="python3")
    client.execute_interactive("%load_ext jupyter_llmcloud", timeout=60)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_a_killed_kernel_loses_nothing(shared_server: ServerClient, kernel: Any) -> None:
    manager, client = kernel
    client.execute(SLOW_CELL.format(trials=6, name="orphan"))
    folder = SweepStore().folder("orphan")
    until(lambda: (folder.path / "sweep.json").exists() and len(folder.read().trials) > 1, "it has begun", 90)
    os.killpg(os.getpgid(manager.provisioner.pid), signal.SIGKILL)
    told = ended(shared_server, "orphan")
    assert [trial["state"] for trial in told["trials"]] == ["done"] * 6 and told["state"] == "finished"


STOPPED_CELL = """\
%%sweep -n 2 --trials 3 --name pressed --push width,halts --seed 1
import time
x = trial.suggest_float("x", 0, 1)
while trial.number == 1 and halts:
    time.sleep(0.01)
trial.report(x * width, 1)
"""


@pytest.mark.soak
def test_stop_of_a_cell_keeps_what_is_done_and_the_cell_goes_on_with_what_is_pushed_then(
    shared_server: ServerClient, kernel: Any, tmp_path: Path
) -> None:
    manager, client = kernel
    client.execute_interactive("width, halts = 4, True", timeout=30)
    client.execute(STOPPED_CELL)
    folder = SweepStore().folder("pressed")
    until(lambda: (folder.path / "sweep.json").exists() and len(folder.read().trials) == 2, "its second one runs", 90)
    manager.interrupt_kernel()
    told = client.get_shell_msg(timeout=60)["content"]
    assert told["ename"] == "KeyboardInterrupt" and "%sweeps resume pressed goes on" in told["evalue"]
    client.execute_interactive("width, halts = 8, False", timeout=60)
    told = client.execute_interactive(STOPPED_CELL.replace("--trials", "--resume --trials"), timeout=120)["content"]
    assert told["status"] == "ok"
    trials = shared_server.sweep("pressed")["trials"]
    assert [trial["state"] for trial in trials] == ["done", "stopped", "done", "done"]
    assert [trial["value"] / trial["params"]["x"] for trial in trials if trial["value"]] == [4.0, 8.0, 8.0]
    file = tmp_path / "trial.py"
    told = client.execute_interactive(f"%runs export {trials[2]['run_id']} {file}", timeout=60)["content"]
    assert told["status"] == "ok" and "width = 8" in file.read_text()


@pytest.mark.soak
def test_a_sweep_whose_server_was_killed_is_gone_on_with_by_another_one(
    own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SLOW_CELL.partition("\n")[2]
    options = {"nproc": 1, "trials": 6, "metric": "loss"}
    folder = SweepStore().folder("bereft")
    with headless_server("first") as server:
        server.start_sweep(source=source, name="bereft", **options)
        until(lambda: len(folder.read().trials) > 2, "it has begun", 90)
        os.kill(server.status()["pid"], signal.SIGKILL)
        until(lambda: folder.true_state(folder.read()) == "interrupted", "it is interrupted")
    before = {row.number: row.value for row in folder.read().trials if row.state == "done"}
    with headless_server("second") as server:
        assert server.sweep("bereft")["state"] == "interrupted"
        server.start_sweep(name="bereft", resume=True)
        told = ended(server, "bereft")
    assert told["state"] == "finished" and [trial["state"] for trial in told["trials"]] == ["done"] * 6
    assert {trial["number"]: trial["value"] for trial in told["trials"]}.items() >= before.items()


@pytest.mark.soak
@pytest.mark.usefixtures("own_root")
def test_a_killed_agent_costs_the_trials_that_it_had_one_more_attempt() -> None:
    with headless_server("short-lived", slots=8) as server:
        source = SLOW_CELL.partition("\n")[2]
        server.start_sweep(source=source, name="moved", nproc=2, trials=5, parallel=2, metric="loss")
        until(lambda: len(server.sweep("moved")["trials"]) > 2, "two trials run", 90)
        for process in psutil.process_iter(["cmdline"]):
            words = " ".join(process.info["cmdline"] or [])
            if "jupyter_llmcloud.agent " in words and str(config.runtime_dir()) in words:
                process.kill()
        told = ended(server, "moved")
    assert told["state"] == "finished" and [trial["state"] for trial in told["trials"]] == ["done"] * 5
    assert max(trial["num_attempts"] for trial in told["trials"]) == 2
