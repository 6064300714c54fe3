"""The `run` object outside a rank: the same face, quiet, so that a cell can be moved without edits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class NullRun:
    """Logs nowhere, never asks to stop; its folder is the working directory."""

    id = ""
    name = ""
    rank = 0
    world_size = 1
    should_stop = False
    resumed_step = 0

    @property
    def folder(self) -> Path:
        """Where an ordinary cell would write its files."""
        return Path.cwd()

    def log(self, values: Mapping[str, Any] | None = None, /, *, step: int | None = None, **metrics: Any) -> None:
        """Nothing is recorded outside a run."""

    def progress(self, step: float, total: float | None = None, desc: str = "") -> None:
        """No progress bar outside a run."""

    def steps(self, total: int) -> Iterator[int]:
        """Count from 0 to `total`."""
        return iter(range(total))

    def checkpoint(self, *, metric: Any = None, mode: str = "min", **objects: Any) -> None:
        """No checkpoints outside a run."""

    def __repr__(self) -> str:
        return "<no run: this is not a rank>"


run = NullRun()
