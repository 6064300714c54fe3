"""The `run` object of a rank's namespace."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_llmcloud.training.outlet import Outlet, number


class Run:
    """The run of the cell that is being executed.

    Attributes:
        id, name: of the run.
        folder: its folder, for files that should stay with it.
        rank, world_size: of this process.
    """

    def __init__(self, outlet: Outlet, rank: int, world_size: int) -> None:
        self._outlet = outlet
        self.rank = rank
        self.world_size = world_size
        self.id = ""
        self.name = ""
        self.folder = Path()
        self.should_stop = False

    def begin(self, run_id: str, name: str, folder: str) -> None:
        """A new cell."""
        self.id, self.name, self.folder = run_id, name, Path(folder)
        self.should_stop = False

    def log(self, values: Mapping[str, Any] | None = None, /, *, step: int | None = None, **metrics: Any) -> None:
        """Log numbers: `run.log(loss=0.3)` or `run.log({"loss": 0.3}, step=7)`. What is not one number is left out."""
        if metrics:
            values = {**(values or {}), **metrics}
        if not values:
            return
        for value in values.values():
            if type(value) is not float:
                values = _numbers(values)
                break
        if values:
            self._outlet.measure("values", step, values)

    def progress(self, step: float, total: float | None = None, desc: str = "") -> None:
        """Move the progress bar: `step` of `total` is done."""
        self._outlet.measure("progress", step, total, desc)

    def __repr__(self) -> str:
        return f"<run {self.id or 'none'}: rank {self.rank} of {self.world_size}, pid {os.getpid()}>"


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    converted = {str(name): number(value) for name, value in values.items()}
    return {name: value for name, value in converted.items() if value is not None}
