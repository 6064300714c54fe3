"""Recorded runs as they are compared: their options, versions and topology, and the curves of their first rank."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jupyter_llmcloud.core.run.comparison import ComparedRun, RunDifferences, compare
from jupyter_llmcloud.errors import NotFound, UsageError
from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.recorded.export import with_cells_behind
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore

_OF_THE_CALL = ("name", "background", "export", "nproc")  # how many ranks there were is told by where it ran


def compared(store: RunStore, names: Sequence[str], tolerance: float = 0.0) -> RunDifferences:
    """Compare runs by id or name; names of the same run count once. Raises NotFound, UsageError."""
    folders = {folder.run_id: folder for folder in map(store.find, names)}
    return compare([_of(store, folder) for folder in folders.values()], tolerance)


def compared_again(store: RunStore, name: str, again: str) -> RunDifferences:
    """Compare a run with one that was made from it: its options and its text say nothing, where it ran does."""
    folders = store.find(name), store.find(again)
    records = [(folder, folder.read()) for folder in folders]
    return compare([ComparedRun(r.run_id, "", _where(r), _curves(folder, r)) for folder, r in records])


def facts_of(record: RunRecord) -> dict[str, Any]:
    """What it was asked for, what was pushed for it, and where it ran, flat."""
    asked = {name: value for name, value in record.spec.items() if name not in _OF_THE_CALL}
    pushed = {f"pushed {name}": text or "an object" for name, text in record.pushed.items()}
    return {**asked, **pushed, **_where(record)}


def _where(record: RunRecord) -> dict[str, Any]:
    """How it ended, on what, with which versions."""
    git = {f"git {name}": value for name, value in record.git.items() if name != "folder"}
    ranks = {"ranks": len(record.ranks) or record.world_size, **record.topology}
    return {"state": record.state, **ranks, **record.versions, **git, "restarts": record.num_restarts}


def _of(store: RunStore, folder: RunFolder) -> ComparedRun:
    """What a run computes is also in the cells before it: a model that is defined otherwise is other code."""
    record = folder.read()
    text = ""
    with contextlib.suppress(UsageError, NotFound):  # a source that is not there is not compared
        text, pushed = with_cells_behind(store, record)
        record = replace(record, pushed=pushed)
    return ComparedRun(record.run_id, text, facts_of(record), _curves(folder, record))


def _curves(folder: RunFolder, record: RunRecord) -> dict[str, dict[float, float]]:
    """Of its first rank. A step that was done again after a restart counts as it was done last.

    Values without a step are numbered.
    """
    curves: dict[str, dict[float, float]] = {}
    path = folder.metrics(min(record.ranks, default=0))
    for row in read_all(path) if path.exists() else ():
        for name, value in (row.get("values") or {}).items():
            curve = curves.setdefault(name, {})
            step = row.get("step")
            curve[float(len(curve) if step is None else step)] = float("nan") if value is None else float(value)
    return curves
