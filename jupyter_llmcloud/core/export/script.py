"""A run as a plain script: the same losses under torchrun and accelerate launch, without this package."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.export import prelude
from jupyter_llmcloud.core.export.cells import ScriptPart, SourceCell, needed_cells
from jupyter_llmcloud.core.export.names_used import EVERYTHING, names_used, takes
from jupyter_llmcloud.core.export.own_calls import plain_code, with_names_of_python, without_futures
from jupyter_llmcloud.core.export.plans import check_options
from jupyter_llmcloud.errors import UsageError


@dataclass(frozen=True)
class ExportedRun:
    """What is exported.

    Attributes:
        num_ranks: on which it ran.
        num_threads: of torch on each of them.
        has_gpus: whether they had GPUs.
        created: when it began, in seconds since the epoch.
        versions: of the libraries that it had.
    """

    cell: SourceCell
    name: str
    num_ranks: int
    num_threads: int = 1
    has_gpus: bool = False
    created: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportedScript:
    """The text of the script, and what there is to say of it."""

    text: str
    notes: list[str]
    launches: list[str]


def export(run: ExportedRun, earlier: Sequence[SourceCell], file: str) -> ExportedScript:
    """Write the script, which is to be kept as `file`; `earlier`: what the same ranks ran before, the oldest first.

    Raises:
        UsageError: something of it cannot go along; it is named, with the way out.
    """
    if not run.cell.on_all_ranks:
        raise UsageError(f"run {run.cell.run_id} ran on some ranks only: export a run of all ranks of its world.")
    notes = check_options(run.cell.spec)
    parts, more = needed_cells(run.cell, earlier)
    for part in parts[:-1]:
        notes += [note for note in _checked_before(part.cell) if note not in notes]
    notes += more
    if not any("seed" in part.cell.spec for part in parts) and "seed" not in "".join(part.cell.code for part in parts):
        notes.append("Neither --seed nor the cells seed anything: where they draw random numbers, losses differ.")
    launches = launch_lines(file, run.num_ranks, run.num_threads, run.has_gpus)
    return ExportedScript(_text(run, parts, notes, launches), notes, launches)


def _checked_before(cell: SourceCell) -> list[str]:
    try:
        return check_options(cell.spec)
    except UsageError as error:
        raise UsageError(f"run {cell.run_id}, which ran before and goes along: {error}") from None


def source_for_ranks(cell: SourceCell, earlier: Sequence[SourceCell]) -> str:
    """The cell and what it needs as one cell for the ranks of a world, which is to be run with `--fresh`.

    Where cells go along with it, each is seeded as its own run was, and the new run is to be given no seed.
    Raises UsageError that names what cannot go along.
    """
    parts, _ = needed_cells(cell, earlier)
    if len(parts) == 1 and not parts[0].assigned and not cell.trial:
        return cell.code
    pieces = ["from jupyter_llmcloud.training.group.random_streams import STREAMS\n"]
    futures = list[str]()
    settings = _settings(cell)  # which the new run is given
    for part in parts:
        code, found = without_futures(part.cell)
        futures += [line for line in found if line not in futures]
        own = _settings(part.cell) if part.cell.code else settings
        pieces += [line for line in own if line not in settings]
        settings = own
        pieces += [f"{name} = {text}" for name, text in part.assigned]
        pieces += [part.cell.trial] if part.cell.trial else []
        pieces.append(f"STREAMS.begin_again({part.cell.spec.get('seed')!r})\n{code.rstrip()}\n")
    return "\n".join([*futures, *pieces])


def arguments_of(cell: SourceCell) -> list[str]:
    """What a cell found in sys.argv[1:]."""
    return shlex.split(cell.spec.get("args") or "")


def precision_of(cell: SourceCell) -> str:
    """In which precision an Accelerator of a cell computes."""
    return str(cell.spec.get("precision") or "no")


_MODULES = ("os", "sys")


def _settings(cell: SourceCell, is_hidden: bool = True) -> list[str]:
    """Lines that set what a run finds in its process; they bind no name. `is_hidden`: the modules have no name here."""
    of_system, of_process = (f"__import__({name!r})" if is_hidden else name for name in _MODULES)
    return [
        f"{of_process}.argv[1:] = {arguments_of(cell)!r}",
        f"{of_system}.environ['ACCELERATE_MIXED_PRECISION'] = {precision_of(cell)!r}",
    ]


def launch_lines(file: str, num_ranks: int, num_threads: int, has_gpus: bool) -> list[str]:
    """Commands that start the script on one host: torchrun, accelerate launch, sbatch."""
    quoted, threads = shlex.quote(file), f"OMP_NUM_THREADS={num_threads} "
    torchrun = f"torchrun --nproc-per-node {num_ranks} {quoted}"
    several = "--multi_gpu " if num_ranks > 1 else ""
    accelerate = f"accelerate launch {several}--num_processes {num_ranks} --num_machines 1 --mixed_precision no "
    accelerate += f"--dynamo_backend no {quoted}"
    asked = f"--gpus-per-node={num_ranks}" if has_gpus else f"--cpus-per-task={num_ranks * num_threads}"
    sbatch = f"sbatch --nodes=1 --ntasks=1 {asked} --wrap {shlex.quote(threads + torchrun)}"
    return [threads + torchrun, threads + accelerate, sbatch]


def _text(run: ExportedRun, parts: Sequence[ScriptPart], notes: Sequence[str], launches: Sequence[str]) -> str:
    bodies, futures = list[str](), list[str]()
    seeds = any(part.cell.spec.get("seed") is not None for part in parts)
    has_arguments = any(arguments_of(part.cell) for part in parts)
    is_hidden = any(name in dict(part.assigned) or takes(name, part.cell.tree) for part in parts for name in _MODULES)
    for number, part in enumerate(parts):
        code, found = plain_code(part.cell, [other.cell for other in parts[:number]])
        futures += [line for line in found if line not in futures]
        settings = _settings(part.cell, is_hidden)
        bodies.append(_body(part, code, settings if has_arguments and part.cell.code else settings[1:]))
    codes = "\n".join(part.cell.code for part in parts)
    own = [
        prelude.PROCESS.format(
            num_ranks=run.num_ranks, num_threads=run.num_threads, run_id=run.cell.run_id, name=run.name
        )
    ]
    if "accelerate" in codes.lower() and ".log(" in codes:
        own.append(prelude.ACCELERATOR_LOG)
    if seeds:
        own.append(prelude.SEEDS)
    if any("display" in names_used(part.cell.tree).needed for part in parts):
        own.append("display = print\n")
    saved = run.cell.spec.get("save")
    bound = {name for part in parts for name in (*names_used(part.cell.tree).bound, *dict(part.assigned))}
    taken = None if EVERYTHING in bound else bound
    begin = prelude.SETTINGS.format(precision=precision_of(run.cell))
    own = [with_names_of_python(piece, taken) for piece in own]
    save = [with_names_of_python(prelude.SAVE, taken), f"\n_save({', '.join(saved)})\n"] if saved else []
    return "\n".join([_heading(run, notes, launches), *futures, begin, *own, *bodies, *save, prelude.END])


def _heading(run: ExportedRun, notes: Sequence[str], launches: Sequence[str]) -> str:
    when = time.strftime("%Y-%m-%d", time.gmtime(run.created))
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name != "jupyter-llmcloud")
    lines = [f"# Run {run.cell.run_id} of {when}, as a script for {run.num_ranks} processes.", "# Start it with one of"]
    lines += [f"#     {line}" for line in launches]
    lines += [f"# It ran with {versions}."] if versions else []
    lines += [f"# {note}" for note in notes]
    return "\n".join(lines)


def _body(part: ScriptPart, code: str, settings: Sequence[str]) -> str:
    spec: Mapping[str, Any] = part.cell.spec
    lines = [f"# --- run {part.cell.run_id} " + "-" * max(0, 100 - len(part.cell.run_id))]
    lines += [f"{name} = {text}  # pushed from the notebook" for name, text in part.assigned]
    lines.append(part.cell.trial)
    lines += settings
    if spec.get("seed") is not None:
        lines.append(f"_begin_with_seed({spec['seed']})")
    return "\n".join(filter(None, lines)) + "\n" + code.rstrip() + "\n"
