"""Recorded runs as they are compared: their options, versions and topology, and the curves of their first rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jupyter_llmcloud.core.run.comparison import ComparedRun, RunDifferences, compare
from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.recorded.export import body_of
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore

_OF_THE_CALL = ("name", "background", "export")


def compared(store: RunStore, names: Sequence[str], tolerance: float = 0.0) -> RunDifferences:
    """Compare runs by id or name; names of the same run count once. Raises NotFound, UsageError."""
    folders = {folder.run_id: folder for folder in map(store.find, names)}
    return compare([_of(folder) for folder in folders.values()], tolerance)


def facts_of(record: RunRecord) -> dict[str, Any]:
    """What it was asked for and where it ran, flat."""
    asked = {name: value for name, value in record.spec.items() if name not in _OF_THE_CALL}
    where = {"ranks": len(record.ranks) or record.world_size, **record.topology}
    git = {f"git {name}": value for name, value in record.git.items() if name != "folder"}
    return {**asked, "state": record.state, **where, **record.versions, **git, "restarts": record.num_restarts}


def _of(folder: RunFolder) -> ComparedRun:
    record = folder.read()
    try:
        source = folder.source()
    except OSError:
        source = ""
    first = min(record.ranks, default=0)
    return ComparedRun(
        record.run_id, source if record.script else body_of(source), facts_of(record), _curves(folder, first)
    )


def _curves(folder: RunFolder, rank: int) -> dict[str, dict[float, float]]:
    """A step that was done again after a restart counts as it was done last; without steps values are numbered."""
    curves: dict[str, dict[float, float]] = {}
    path = folder.metrics(rank)
    for record in read_all(path) if path.exists() else ():
        for name, value in (record.get("values") or {}).items():
            curve = curves.setdefault(name, {})
            step = record.get("step")
            curve[float(len(curve) if step is None else step)] = float("nan") if value is None else float(value)
    return curves
