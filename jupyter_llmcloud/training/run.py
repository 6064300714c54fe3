"""The `run` object of a rank's namespace."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jupyter_llmcloud.training.output.sender import OutputSender, number, place

if TYPE_CHECKING:
    from jupyter_llmcloud.training.resume.checkpointer import Checkpointer


class Run:
    """The run of the cell that is being executed.

    Attributes:
        id, name: of the run.
        rank, world_size: of this process.
        num_steps: optimizer steps so far, of a run that may be rolled back to one; None of others.
        is_on_all_ranks: whether the cell runs on every rank of its world, not on some as with `--ranks 0`.
    """

    def __init__(self, sender: OutputSender, rank: int, world_size: int, checkpoints: Checkpointer) -> None:
        self._sender = sender
        self.rank = rank
        self.world_size = world_size
        self.id = ""
        self.name = ""
        self._folder = ""
        self.is_on_all_ranks = True
        self.should_stop = False
        self.checkpoints = checkpoints
        self.num_steps: Callable[[], int | None] = lambda: None

    def begin(self, run_id: str, name: str, folder: str, num_ranks: int) -> None:
        """A new cell, which runs on so many ranks."""
        self.is_on_all_ranks = num_ranks in (0, self.world_size)
        self.id, self.name, self._folder = run_id, name, folder
        self.should_stop = False

    @property
    def folder(self) -> Path:
        """Of the run, for files that should stay with it."""
        return Path(self._folder)

    def log(self, values: Mapping[str, Any] | None = None, /, *, step: int | None = None, **metrics: Any) -> None:
        """Log numbers: `run.log(loss=0.3)` or `run.log({"loss": 0.3}, step=7)`. What is not one number is left out."""
        if metrics:
            values = {**(values or {}), **metrics}
        if not values:
            return
        for name, value in values.items():
            if type(value) is not float or type(name) is not str:
                values = _numbers(values)
                break
        if values:
            self._sender.measure("values", place(step), values, self.num_steps())
            if self.checkpoints.follows:
                self.checkpoints.note_metrics(values)

    def progress(self, step: float, total: float | None = None, desc: str = "") -> None:
        """Move the progress bar: `step` of `total` is done."""
        self._sender.measure("progress", place(step), place(total), desc)

    @property
    def resumed_step(self) -> int:
        """The optimizer step from which this cell was resumed; 0 when it runs from its start."""
        return self.checkpoints.resumed_step

    def steps(self, total: int) -> Iterator[int]:
        """Count from 0 to `total`; a cell that is resumed goes on where it was: `for step in run.steps(1000):`."""
        return self.checkpoints.count_steps(total)

    def checkpoint(self, *, metric: Any = None, mode: Literal["min", "max"] = "min", **objects: Any) -> None:
        """Save a checkpoint at the end of this iteration of the training loop (`--checkpoint-every` does so by itself).

        What an Accelerator has prepared, and what an optimizer trains, is saved anyway. Hand over by name what else
        belongs to it: `run.checkpoint(ema=ema, metric=loss)`, anything with state_dict(). The checkpoint with the
        best `metric` is kept besides the last ones.
        """
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: say 'min' when a lower metric is better, 'max' when a higher one is.")
        self.checkpoints.ask(objects, number(metric) if metric is not None else None, mode)

    def __repr__(self) -> str:
        return f"<run {self.id or 'none'}: rank {self.rank} of {self.world_size}, pid {os.getpid()}>"


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    converted = {str(name): number(value) for name, value in values.items()}
    return {name: value for name, value in converted.items() if value is not None}
