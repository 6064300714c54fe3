"""%runs: what was run, and what is running."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class
from IPython.display import display

from jupyter_llmcloud.core.metrics.wording import not_finite_word
from jupyter_llmcloud.core.names import format_ranks
from jupyter_llmcloud.core.options import Option, Syntax, integer, number, parse, split, take_verb
from jupyter_llmcloud.core.output.folding import MAX_CHARS, saved_size
from jupyter_llmcloud.core.output.numerals import format_count, format_step
from jupyter_llmcloud.core.output.paths import shorten
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics.commands.tables import Table, ago, span
from jupyter_llmcloud.magics.output.log_link import log_link
from jupyter_llmcloud.magics.output.run_report import RunReport
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.recorded import compare as comparing
from jupyter_llmcloud.magics.recorded.compare import compare
from jupyter_llmcloud.magics.recorded.take_away import export
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.run_handle import RunHandle
from jupyter_llmcloud.storage import log_text
from jupyter_llmcloud.storage.recorded.diagnosis import as_record, diagnosis_of
from jupyter_llmcloud.storage.remote import run_copy
from jupyter_llmcloud.storage.runs import RunStore

MAX_LINE = MAX_CHARS // 2
MAX_ALERTS = 10  # of a run that is shown
VERBS = {
    "list": Syntax(
        "%runs list",
        (
            Option(("--limit",), "How many, the newest first.", metavar="N", parse=integer(1)),
            Option(("--trials",), "Each trial of a sweep, too, and not the sweep as one row."),
        ),
        "",
        "A table of runs.",
    ),
    "show": Syntax("%runs show", (), "NAME", "One run: state, metrics, artifacts, errors.", names="runs"),
    "attach": Syntax("%runs attach", (), "NAME", "Show all of a run in this cell, then follow it.", names="runs"),
    "logs": Syntax(
        "%runs logs",
        (
            Option(("--rank",), "Of one rank.", metavar="R", parse=integer(0)),
            Option(("--tail",), "The last N lines; else as many as a cell holds.", metavar="N", parse=integer(1)),
            Option(("--follow",), "Show it as it is written, until the run ends or Stop is pressed."),
        ),
        "NAME",
        "What it has written, and the file that holds all of it.",
        names="runs",
    ),
    "stop": Syntax("%runs stop", (), "NAME", "Stop a run; again while it stops: harder.", names="active runs"),
    "checkpoint": Syntax(
        "%runs checkpoint", (), "NAME", "Have a run save a checkpoint now; it goes on.", names="active runs"
    ),
    "compare": Syntax(
        "%runs compare",
        (
            Option(
                ("--tolerance",),
                "Values of metrics are the same within this (relative, 0).",
                metavar="X",
                parse=number(0),
            ),
        ),
        "NAME NAME...",
        "What differs: options, topology, versions, metrics, code.",
        names="runs",
    ),
    "reproduce": Syntax(
        "%runs reproduce",
        (),
        "NAME",
        "Run it again on this notebook's ranks, as if they held no variables, and compare.",
        names="runs",
    ),
    "export": Syntax(
        "%runs export",
        (),
        "NAME FILE.py",
        "Write a run as a plain script that gives the same losses without this package.",
        names="runs",
    ),
    "fetch": Syntax(
        "%runs fetch",
        (),
        "NAME",
        "Have a run here, as far as it is at the URL that LLMCLOUD_ROOT names, with its newest checkpoint.",
    ),
    "delete": Syntax("%runs delete", (), "NAME", "Remove a run that has ended, with its model.", names="runs"),
}


def get(name: str) -> RunHandle:
    """The run with this id, else the newest one with this name."""
    run = session.current().server.run(name)
    return RunHandle(run["run_id"], lambda: session.current().server)


def table(limit: int | None = None, trials: bool = False) -> Table:
    """Runs, the newest first; a sweep is one row, unless each of its trials is asked for."""
    server = session.current().server
    rows, runs = [], server.runs(limit=limit or 20) if trials else server.runs_and_sweeps(limit or 20)
    has_cost = any(run.get("cost") is not None for run in runs)
    for run in runs:
        not_finite = run.get("not_finite") or {}
        values = [*(run.get("metrics") or {}).items()][:3]
        metrics = ", ".join(f"{name} {_short(value, not_finite.get(name))}" for name, value in values)
        lasted = span((run["ended"] or time.time()) - run["created"])
        kept = ", ".join(run.get("artifacts") or {})
        rows.append(
            (
                run["run_id"],
                run["name"],
                run["state"],
                ago(run["created"]),
                lasted,
                run["world_size"],
                metrics,
                kept,
                *([_cost(run.get("cost"))] if has_cost else []),
            )
        )
    headings = ["run", "name", "state", "began", "took", "ranks", "last metrics (first rank)", "saved"]
    headings += ["cost"] if has_cost else []
    return Table(headings, rows, "There are no runs yet.")


def _cost(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def _short(value: Any, not_finite: Mapping[str, Any] | None) -> str:
    """`1.41`, `NaN since step 60`: JSON has no number for it, so that the value is null."""
    if isinstance(value, (int, float)):
        return f"{value:.4g}"
    if not_finite is None:
        return "NaN"
    return f"{not_finite_word(not_finite.get('value'))} since step {format_count(not_finite['since'])}"


def show(name: str) -> RunReport:
    """One run."""
    told = session.current().server.run(name)
    folder, state = RunStore().folder(told["run_id"]), str(told["state"])
    record = folder.read()
    rows: Any = [
        ("run", record.run_id),
        ("state", state),
        ("ranks", format_ranks(record.ranks)),
        ("cluster", record.cluster),
        ("began", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))),
        ("took", span((record.ended or time.time()) - record.created)),
    ]
    rows += [("note", shown(why)) for why in record.notes if why.partition(": ")[0] not in record.alerts][-5:]
    rows += [("alert", _as_row(alert)) for alert in folder.alerts()[-MAX_ALERTS:]]
    rows += [("saved", shown(str(folder.path / path))) for path in record.artifacts.values()]
    rows += [
        (f"error on rank {error['rank']}", shown(": ".join(filter(None, (error["ename"], error["evalue"])))))
        for error in record.errors[:3]
    ]
    if why := record.diagnosis or as_record(diagnosis_of(folder, replace(record, state=state), record.hang)):
        rows += [("why", shown(why["sentence"])), ("try", why["action"])]
    return RunReport(Table(["", ""], rows, ""), folder, record, state)


def _as_row(alert: Mapping[str, Any]) -> str:
    where = f" at step {format_step(alert['step'])}" if "step" in alert and "step" not in alert["text"] else ""
    return f"{alert['detector']}{where}: {alert['text']} ({alert['evidence']})"


def logs(name: str, rank: int | None = None, tail: int | None = None, follow: bool = False) -> None:
    """Print what a run has written: the end of it, when it is more than a cell holds."""
    handle = get(name)
    if rank is not None and rank not in handle.record.ranks:
        raise UsageError(f"--rank {rank}: the run has ranks {format_ranks(handle.record.ranks)}.")
    if follow:
        handle.follow_logs(rank)
        return
    kept: deque[str] = deque()
    size = num_lines = 0
    for line in log_text.lines(handle.folder, rank):
        num_lines += 1
        kept.append(line if saved_size(line) < MAX_LINE else line[: MAX_LINE // 8] + "…")
        size += saved_size(kept[-1])
        while size > MAX_CHARS or (tail is not None and len(kept) > tail):
            size -= saved_size(kept.popleft())
    if left := num_lines - len(kept):
        print(f"… {left:,} lines before these: {shown(str(log_text.write(handle.folder)))}", flush=True)
        if data := log_link(handle.run_id, handle.record.name):
            display(data, raw=True)
    print(shorten("\n".join(kept), []))  # names of code only: what a program prints is its own


def stop(name: str) -> str:
    """Press Stop; returns the state."""
    return session.current().server.stop_run(get(name).run_id)["state"]


def checkpoint(name: str) -> int:
    """Have a run save a checkpoint of its next step; returns the step, when it is complete."""
    return int(session.current().server.checkpoint_run(get(name).run_id)["step"])


def reproduce(name: str) -> comparing.ComparisonReport:
    """Run it again on this notebook's ranks, as if they held no variables, and compare.

    Raises UsageError that names what it needs and cannot have again.
    """
    from IPython.core.getipython import get_ipython

    return comparing.reproduce(get_ipython(), name)


def delete(name: str) -> None:
    """Remove a run that has ended."""
    session.current().server.delete_run(get(name).run_id)


def fetch(name: str) -> RunHandle:
    """Have a run here that is at the URL which LLMCLOUD_ROOT names, with its newest checkpoint."""
    return get(run_copy.fetch(RunStore(), name).run_id)


@magics_class
class RunsMagics(Magics):
    """Registered by `%load_ext jupyter_llmcloud`."""

    @line_magic
    def runs(self, line: str) -> Any:
        """%runs [list | show | attach | logs | compare | reproduce | export | stop | checkpoint | fetch | delete]."""
        words = split(line, "%runs")
        verb = take_verb("%runs", VERBS, words, "list")
        given = parse(VERBS[verb], words)
        match verb:
            case "list":
                return table(given.limit, given.trials)
            case "show":
                return show(given.arguments[0])
            case "attach":
                return get(given.arguments[0]).attach()
            case "logs":
                logs(given.arguments[0], given.rank, given.tail, given.follow)
            case "stop":
                print(f"{given.arguments[0]}: {stop(given.arguments[0])}")
            case "checkpoint":
                print(f"{given.arguments[0]}: step {checkpoint(given.arguments[0])}")
            case "compare":
                return compare(*given.arguments, tolerance=given.tolerance or 0.0)
            case "reproduce":
                return comparing.reproduce(self.shell, given.arguments[0])
            case "export":
                export(given.arguments[0], given.arguments[1])
            case "fetch":
                return fetch(given.arguments[0])
            case "delete":
                delete(given.arguments[0])
        return None


def list(limit: int = 20) -> Any:
    """Runs as dicts, the newest first."""
    return session.current().server.runs(limit=limit)
