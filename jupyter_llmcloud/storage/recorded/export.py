"""A recorded run, with the runs of the same ranks before it, as a plain script or as one cell."""

from __future__ import annotations

import shlex
from pathlib import Path

from jupyter_llmcloud.core.export.cells import ScriptPart, SourceCell, cells_behind, last_without_commands, needed_cells
from jupyter_llmcloud.core.export.own_calls import plain_code
from jupyter_llmcloud.core.export.plans import check_options
from jupyter_llmcloud.core.export.script import ExportedRun, ExportedScript, export, source_for_ranks
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.run_request import without_leading_blank_lines
from jupyter_llmcloud.storage.recorded.trials import fixed_trial
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord, RunStore
from jupyter_llmcloud.system.atomic_files import write_atomically

MAGICS = ("%%distribute", "%%sweep")


def exported(store: RunStore, name: str, file: str) -> ExportedScript:
    """The script of a run, to be kept as `file`.

    Raises:
        NotFound: there is no such run.
        UsageError: something that it needs cannot go along, or the run's folder has no source.
    """
    folder = store.find(name)
    record = folder.read()
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
    return export(run, _before(store, record), file)


def check(code: str, spec: RunSpec, is_resumed: bool) -> None:
    """What can be told before a cell is run that is to be exported. Raises UsageError that names what cannot go along.

    What it needs of earlier cells is looked for when it has run.
    """
    if spec.background:
        raise UsageError(
            "--export waits for the end of the run, -b does not. Leave one out; %runs export writes it later."
        )
    if spec.ranks:
        raise UsageError("--export writes a script for all ranks of a world: leave --ranks out.")
    asked = {**spec.as_dict(), **({"resume": spec.resume} if is_resumed else {})}
    check_options(asked)
    plain_code(last_without_commands(SourceCell("of this cell", code, spec=asked))[0])


def as_one_cell(store: RunStore, name: str) -> tuple[RunRecord, str, bool]:
    """The record of a run, the text that ranks without any variable run again, and whether the run's seed is in it.

    Raises NotFound, and UsageError as `exported` does.
    """
    folder = store.find(name)
    record = folder.read()
    cell = _cell(folder, record)
    if record.script or not cell.on_all_ranks or record.spec.get("resume"):
        why = "is a script" if record.script else "ran on some ranks only" if not cell.on_all_ranks else "was resumed"
        raise UsageError(
            f"run {record.run_id} {why}: it cannot be reproduced from here. Run it again as it was started."
        )
    source = source_for_ranks(cell, _before(store, record))
    return record, source, source != cell.code


def needed_before(store: RunStore, world_id: str, cell: SourceCell) -> list[ScriptPart]:
    """The earlier cells of a world that a cell needs which has not run yet, and itself as the last.

    Raises UsageError that names what no recorded cell has made.
    """
    same = [other for other in reversed(store.list()) if world_id and other.world_id == world_id and not other.script]
    return needed_cells(cell, [_cell(store.folder(other.run_id), other) for other in same], is_exact=False)[0]


def with_cells_behind(store: RunStore, record: RunRecord) -> tuple[str, dict[str, str]]:
    """The text of a run below those of the earlier cells that have made what it reads, and what of that was pushed.

    Raises UsageError where a source cannot be read.
    """
    cell = _cell(store.folder(record.run_id), record)
    cells, pushed = cells_behind(cell, _before(store, record))
    return "\n\n".join(part.code.strip("\n") for part in (*cells, cell)), {**pushed, **record.pushed}


def write(script: ExportedScript, path: Path) -> None:
    """Keep it. Raises UsageError for a path that cannot be written."""
    try:
        write_atomically(path, script.text.encode(), mode=0o666, durable=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from None


def body_of(source: str) -> str:
    """The code of a cell as it was typed: without its first line, when that is a magic of ours."""
    code = without_leading_blank_lines(source)
    if code.startswith(MAGICS):
        _, _, code = code.partition("\n")
    return without_leading_blank_lines(code)


def _before(store: RunStore, record: RunRecord) -> list[SourceCell]:
    """What the same ranks ran before, the oldest first; a script has a world of its own."""
    if record.script or not record.world_id or record.spec.get("fresh"):
        return []
    same = [other for other in reversed(store.list()) if other.world_id == record.world_id and not other.script]
    return [_cell(store.folder(other.run_id), other) for other in same if other.created < record.created]


def _cell(folder: RunFolder, record: RunRecord) -> SourceCell:
    try:
        source = folder.source()
    except OSError as error:
        raise UsageError(f"the source of run {record.run_id} cannot be read: {error.strerror}.") from None
    spec = record.spec
    if arguments := record.script.get("arguments"):
        spec = {**spec, "args": shlex.join(arguments)}
    return SourceCell(
        record.run_id,
        source if record.script else body_of(source),
        record.state,
        spec,
        record.pushed,
        on_all_ranks=len(record.ranks) == record.world_size,
        num_ranks=record.world_size,
        trial=fixed_trial(record),
    )
