"""`--dry-run` and `--rehearse` of a cell: what its ranks hold is made again from recorded cells, elsewhere."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from jupyter_llmcloud.client.preflight import RANKS, CellText, check_options, dry_run, rehearse
from jupyter_llmcloud.client.stop_signal import said_when_stopped
from jupyter_llmcloud.core.export.cells import SourceCell, without_commands
from jupyter_llmcloud.core.export.script import arguments_of, precision_of
from jupyter_llmcloud.core.parallel.accelerate_config import of_option
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.magics.session.cell import Cell
from jupyter_llmcloud.storage.recorded.export import needed_before
from jupyter_llmcloud.storage.runs import RunStore

if TYPE_CHECKING:
    from jupyter_llmcloud.magics.session.world_client import WorldClient


class HasWorld(Protocol):
    """The session, as far as it matters here."""

    world: WorldClient | None


def preflight(session: HasWorld, cell: Cell, spec: RunSpec, pushed: bytes) -> None:
    """Show what was found; no rank of the notebook takes part, and no run is recorded.

    Raises UsageError when the cell needs what no recorded cell has made, or the world does not fit the plan.
    """
    for line in check_options(spec):
        print(line, flush=True)
    world = session.world
    size = spec.nproc or (world.world_size if world is not None else RANKS)
    text = CellText(_parts(cell, spec, world.world_id if world is not None else ""), pushed=pushed, **_arguments(spec))
    file = of_option(spec.accelerate_config)
    precision = spec.precision or file.precision
    with said_when_stopped("stopped. Nothing was trained."):
        if spec.rehearse:
            print(*rehearse(text, precision).lines, sep="\n", flush=True)
        if spec.dry_run:
            report = dry_run(text, spec.plan or file.plan or None, size, precision)
            print(*report.lines, sep="\n", flush=True)


def _arguments(spec: RunSpec) -> dict[str, Any]:
    return {"arguments": shlex.split(spec.args or "")}


def _parts(cell: Cell, spec: RunSpec, world_id: str) -> list[dict[str, Any]]:
    given = "".join(f"{name} = None\n" for name in spec.push or ())  # so that nobody looks for them in earlier cells
    tried, commands = without_commands(SourceCell("this cell", cell.code, spec=spec.as_dict()))
    for command in commands:
        print(f"Left out: {command!r}.", flush=True)
    parts = []
    for part in needed_before(RunStore(), world_id, replace(tried, code=given + tried.code))[:-1]:
        code = "".join(f"{name} = {value}\n" for name, value in part.assigned) + part.cell.code
        earlier = _part(f"<{part.cell.run_id}>", part.cell.run_id, 0, code)
        if part.cell.code:
            earlier |= {"arguments": arguments_of(part.cell), "precision": precision_of(part.cell)}
        parts.append(earlier)
    return [*parts, _part(cell.filename, f"Cell In[{cell.number}]", cell.line_offset, tried.code)]


def _part(filename: str, shown: str, line_offset: int, code: str) -> dict[str, Any]:
    return {"filename": filename, "shown": shown, "line_offset": line_offset, "code": code}
