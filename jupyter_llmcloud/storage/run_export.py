"""A recorded run, with the runs of the same ranks before it, as a plain script."""

from __future__ import annotations

from pathlib import Path

from jupyter_llmcloud.core.export.cells import SourceCell
from jupyter_llmcloud.core.export.script import ExportedRun, Script, export
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.run_request import without_leading_blank_lines
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore
from jupyter_llmcloud.system.atomic_files import write_atomically

MAGIC = "%%distribute"


def exported(store: RunStore, name: str, file: str) -> Script:
    """The script of a run, to be kept as `file`.

    Raises:
        NotFound: there is no such run.
        UsageError: something that it needs cannot go along, or the run's folder has no source.
    """
    folder = store.find(name)
    record = folder.read()
    earlier: list[RunRecord] = []
    if record.world_id and not record.script:
        same = [other for other in store.list() if other.world_id == record.world_id and not other.script]
        earlier = [other for other in same if other.created < record.created and other.run_id != record.run_id]
    threads = record.topology.get("threads") or [1]
    run = ExportedRun(
        _cell(folder, record),
        record.name,
        record.world_size,
        num_threads=int(threads[0]),
        has_gpus=record.topology.get("device") == "gpu",
        created=record.created,
        versions=record.versions,
    )
    return export(run, [_cell(store.folder(other.run_id), other) for other in reversed(earlier)], file)


def write(script: Script, path: Path) -> None:
    """Keep it. Raises UsageError for a path that is no Python file, or cannot be written."""
    if path.suffix != ".py":
        raise UsageError(f"{path}: the script's file ends in .py.")
    try:
        write_atomically(path, script.text.encode(), mode=0o666, durable=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None


def body_of(source: str) -> str:
    """The code of a cell as it was typed: without its first line, when that is the magic."""
    code = without_leading_blank_lines(source)
    if code.startswith(MAGIC):
        _, _, code = code.partition("\n")
    return code


def _cell(folder: RunFolder, record: RunRecord) -> SourceCell:
    try:
        source = folder.source()
    except OSError as error:
        raise UsageError(f"the source of run {record.run_id} cannot be read: {error.strerror}.") from None
    return SourceCell(
        record.run_id,
        source if record.script else body_of(source),
        record.state,
        record.spec,
        record.pushed,
        on_all_ranks=len(record.ranks) == record.world_size,
    )
