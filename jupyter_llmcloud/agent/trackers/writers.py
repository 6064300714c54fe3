"""How each tracker is told, by its own public interface; imported in its process alone."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from jupyter_llmcloud.agent.trackers.journal_follower import Measured
from jupyter_llmcloud.storage.runs import RunRecord

PROJECT = "jupyter-llmcloud"
WANDB_STEP = "step"
MLFLOW_BATCH = 1000  # metrics in one request, at most
_NOT_IN_MLFLOW = re.compile(r"[^\w\-./ :]")


class TrackerWriter(Protocol):
    """One run at one tracker."""

    def log(self, batch: Sequence[Measured]) -> None:
        """Tell it of these; raises what the tracker raises."""

    def finish(self, state: str) -> None:
        """The run has ended in this state."""


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder: %tensorboard --logdir shows them inside JupyterLab."""

    def __init__(self, record: RunRecord, folder: Path, saved: dict[str, str]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder / "tensorboard"), flush_secs=2)

    def log(self, batch: Sequence[Measured]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for measured in batch:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in measured.values.items()]
            self._writer.add_event(Event(wall_time=measured.t, step=measured.step, summary=Summary(value=values)))
        self._writer.flush()

    def finish(self, state: str) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline keeps it in `tracking/` of the run's folder, to be synced later."""

    def __init__(self, record: RunRecord, folder: Path, saved: dict[str, str]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=record.run_id,
            name=record.name,
            config=options(record),
            dir=folder / "tracking",
            resume="allow",
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )
        # Its own count of steps only grows: what another rank has logged, or a run that went back, would be dropped.
        self._run.define_metric(WANDB_STEP)
        self._run.define_metric("*", step_metric=WANDB_STEP)

    def log(self, batch: Sequence[Measured]) -> None:
        for measured in batch:
            self._run.log({WANDB_STEP: measured.step, **measured.values, "_timestamp": measured.t})

    def finish(self, state: str) -> None:
        self._run.finish(exit_code=0 if state in ("finished", "stopped") else 1)


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, record: RunRecord, folder: Path, saved: dict[str, str]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if "run_id" not in saved:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
            tags = {"llmcloud.run_id": record.run_id}
            saved["run_id"] = self._client.create_run(experiment, run_name=record.name, tags=tags).info.run_id
            for key, value in options(record).items():
                self._client.log_param(saved["run_id"], key, value)
        self._run_id = saved["run_id"]

    def log(self, batch: Sequence[Measured]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_NOT_IN_MLFLOW.sub("_", name), value, int(measured.t * 1000), measured.step)
            for measured in batch
            for name, value in measured.values.items()
        ]
        for start in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MLFLOW_BATCH])

    def finish(self, state: str) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED")
        self._client.set_terminated(self._run_id, status)


class Trackio:
    """trackio, which keeps its runs on this machine unless TRACKIO_SPACE_ID says where else."""

    def __init__(self, record: RunRecord, folder: Path, saved: dict[str, str]) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project=project, name=record.run_id, config=options(record), resume="allow")

    def log(self, batch: Sequence[Measured]) -> None:
        for measured in batch:
            self._run.log(measured.values, step=measured.step)

    def finish(self, state: str) -> None:
        self._run.finish()


WRITERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def options(record: RunRecord) -> dict[str, Any]:
    """What a tracker keeps of how a run was started."""
    told = {"world_size": record.world_size, "cluster": record.cluster, **record.spec, **record.versions}
    return {key: value for key, value in told.items() if value not in (None, "", [], {})}
