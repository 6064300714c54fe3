"""`--track` with the trackers themselves: each has one run with every value."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from sysconfig import get_path

import pytest

from jupyter_llmcloud.agent.trackers.writers import WRITERS
from jupyter_llmcloud.storage.journal import JournalWriter
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from tests.compat.environments import python_with
from tests.support.leaks import REPOSITORY

PACKAGES = ("tensorboard==2.21.0", "wandb==0.31.0", "mlflow==3.17.2", "trackio==0.43.0")
READ_BACK = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1] + "/tensorboard")
events.Reload()
print([event.value for event in events.Scalars("loss")])
""",
    "mlflow": """
from mlflow import MlflowClient
client = MlflowClient()
[run] = client.search_runs([client.get_experiment_by_name("jupyter-llmcloud").experiment_id])
assert (run.info.run_name, run.info.status, run.data.params["checkpoint_every"]) == ("mine", "FINISHED", "5")
print([metric.value for metric in client.get_metric_history(run.info.run_id, "loss")])
""",
    "trackio": """
import json, os, sqlite3
database = sqlite3.connect(os.environ["TRACKIO_DIR"] + "/jupyter-llmcloud.db")
print([json.loads(row)["loss"] for row, in database.execute("select metrics from metrics order by step")])
""",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_tracker_has_every_value_once(tmp_path: Path, name: str) -> None:
    python = python_with("trackers", PACKAGES)
    record, folder = (
        RunRecord("mine-1", "mine", "finished", spec={"checkpoint_every": 5}),
        RunFolder(tmp_path / "mine-1"),
    )
    folder.create(record, "")
    (folder.path / "tracking").mkdir()
    JournalWriter(folder.metrics(0)).append([{"values": {"loss": float(step)}, "step": step} for step in range(50)])
    # Ours and what it needs stand on the path; the trackers are in the environment alone.
    own = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db", "TRACKIO_DIR": f"{tmp_path}/t"}
    env = {**os.environ, **own, "HOME": str(tmp_path), "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{get_path('purelib')}"}
    command = [str(python), "-m", "jupyter_llmcloud.agent.trackers", str(folder.path), name, "300"]
    sent = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (sent.returncode, sent.stdout) == (0, ""), sent.stderr
    if name == "wandb":  # whose offline files nothing public reads
        assert re.search(r"^wandb:\s+loss 49$", sent.stderr, re.MULTILINE), sent.stderr
        assert list((folder.path / "tracking/wandb").glob("offline-run-*/*.wandb"))
        return
    program = f"import glob, sys\n{READ_BACK[name]}"
    read = subprocess.run(
        [str(python), "-c", program, str(folder.path)], env=env, capture_output=True, text=True, check=False
    )
    assert read.returncode == 0, read.stderr
    assert read.stdout.splitlines()[-1] == str([float(step) for step in range(50)])
