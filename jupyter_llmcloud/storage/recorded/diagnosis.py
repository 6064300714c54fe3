"""What is left of a run that has failed, gathered for the rules of core/detect/diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from jupyter_llmcloud.core.detect.diagnosis import Diagnosis, Evidence, diagnose
from jupyter_llmcloud.storage.journal import read_last
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord

LOG_TAIL_BYTES = 1 << 15  # of the journal of a rank: what its process wrote before it was ended


def diagnosis_of(folder: RunFolder, record: RunRecord, hang: Mapping[str, Any]) -> Diagnosis | None:
    """Why a run has failed; None where it has not, or where nothing tells.

    Args:
        record: with the state and the errors of its end.
        hang: as the record had it when the run ended.
    """
    dead = [int(error["rank"]) for error in record.errors if str(error.get("ename", "")).startswith("Rank")]
    logs = {rank: _tail(folder, rank) for rank in dead}
    return diagnose(Evidence(record.state, record.errors, hang, logs))


def as_record(found: Diagnosis | None) -> dict[str, Any]:
    """As RunRecord.diagnosis keeps it; empty for none."""
    return {} if found is None else {**asdict(found), "ranks": list(found.ranks)}


def _tail(folder: RunFolder, rank: int) -> str:
    """The last texts of a rank, without its tracebacks and reports."""
    records = read_last(folder.logs(rank), LOG_TAIL_BYTES)
    return "".join(str(record.get("text") or "") for record in records if record.get("kind") in ("stdout", "stderr"))
