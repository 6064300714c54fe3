"""How others write a dict of numbers during training: `log(values, step)` of each, and what a reader finds afterwards.

Runs in the processes of the peers; imports each library when it is asked for. Every library is used as its own
documentation or Accelerate's tracker uses it, without a network.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Log = Callable[[Mapping[str, float], int], None]


def json_line(folder: Path) -> Log:
    """A line of JSON, flushed: what a careful script does by hand."""
    file = (folder / "values.jsonl").open("a")

    def log(values: Mapping[str, float], step: int) -> None:
        file.write(json.dumps({"step": step, "t": time.time(), **values}) + "\n")
        file.flush()

    return log


def tensorboard(folder: Path) -> Log:
    """`add_scalar` for each value; a thread of its own writes them, when it comes to it."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, global_step=step)

    return log


def tensorboard_flushed(folder: Path) -> Log:
    """The same with a flush after each dict, as Accelerate's tracker does."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, global_step=step)
        writer.flush()

    return log


def wandb_offline(folder: Path) -> Log:
    """`run.log` of a run without a network."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    import wandb

    run = wandb.init(project="bench", dir=str(folder), mode="offline")
    return lambda values, step: run.log(dict(values), step=step)


def trackio(folder: Path) -> Log:
    """`run.log` into its SQLite file."""
    os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    import trackio

    run = trackio.init(project="bench", auto_log_gpu=False, auto_log_cpu=False)
    return lambda values, step: run.log(dict(values), step=step)


WRITERS: dict[str, Callable[[Path], Log]] = {
    "a flushed JSON line": json_line,
    "TensorBoard": tensorboard,
    "TensorBoard, flushed as by Accelerate": tensorboard_flushed,
    "W&B offline": wandb_offline,
    "trackio": trackio,
}
PACKAGES = {
    "TensorBoard": "tensorboard",
    "TensorBoard, flushed as by Accelerate": "tensorboard",
    "W&B offline": "wandb",
    "trackio": "trackio",
}


def count(name: str, folder: Path) -> int:
    """How many logged dicts a reader finds."""
    if name == "a flushed JSON line":
        return sum(_is_whole(line) for line in (folder / "values.jsonl").read_text().splitlines())
    if name == "trackio":
        return _count_rows(folder / "bench.db")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return min((len(events.Scalars(tag)) for tag in tags), default=0)


def _count_rows(path: Path) -> int:
    with sqlite3.connect(path) as database:
        if not database.execute("select 1 from sqlite_master where name = 'metrics'").fetchone():
            return 0  # killed before the first batch
        return int(database.execute("select count(*) from metrics").fetchone()[0])


def _is_whole(line: str) -> bool:
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


if __name__ == "__main__":  # count NAME FOLDER
    print(count(sys.argv[1], Path(sys.argv[2])))
