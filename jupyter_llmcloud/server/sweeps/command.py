"""`jupyter llmcloud sweep`: a script with `trial.suggest_...` as many trials, without a notebook."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.core.output.columns import format_table
from jupyter_llmcloud.core.search.spec import SweepSpec
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.server.run_command import add_options, read_options

FAILED, STOPPED = 1, 130
WAIT_S = 5.0


def add_sweep(nouns: Any) -> None:
    """The command and its options."""
    command = nouns.add_parser(
        "sweep", help="run a script that asks trial.suggest_... as many trials, on the running server; Ctrl-C stops it"
    )
    command.add_argument("file", nargs="?", metavar="FILE.py", help="the script; left out with --resume: as it was")
    add_options(command, SweepSpec.options(Interface.SHELL))
    command.add_argument("--json", action="store_true", help="the result as JSON")
    command.set_defaults(run=_sweep, noun="sweep")


def add_sweeps(nouns: Any) -> None:
    """What there is to do with sweeps that have begun. One goes on by `sweep --name NAME --resume`."""
    command = nouns.add_parser("sweeps", help="list, show, stop or delete sweeps of the running server")
    verbs = command.add_subparsers(metavar="VERB")
    for parser in (command, verbs.add_parser("list", help="the sweeps")):
        _with_json(parser)
        parser.set_defaults(run=_list, noun="sweeps")
    for verb, run, text in (
        ("show", _show, "all trials of a sweep"),
        ("stop", _stop, "stop a sweep; what is done is kept"),
        ("delete", _delete, "remove a sweep that has ended; its runs stay"),
    ):
        parser = verbs.add_parser(verb, help=text)
        parser.add_argument("name", metavar="NAME")
        parser.set_defaults(run=run, noun="sweeps")
        if verb == "show":
            _with_json(parser)


def _with_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON, with all there is")


def _list(arguments: argparse.Namespace) -> None:
    sweeps = discovery.find_running().sweeps()
    if getattr(arguments, "json", False):
        print(json.dumps(sweeps, indent=2))
        return
    rows = [
        [told["name"], told["state"], _time(told["created"]), str(told["num_trials"]), *_best(told)] for told in sweeps
    ]
    print(format_table(("name", "state", "created", "trials", "best", "of run", "note"), rows))


def _time(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def _best(told: Mapping[str, Any]) -> tuple[str, str, str]:
    best = told["best"] or {"value": "", "run_id": ""}
    return str(best["value"]), best["run_id"], told["reason"] or told["note"]


def _show(arguments: argparse.Namespace) -> None:
    told = discovery.find_running().sweep(arguments.name)
    if getattr(arguments, "json", False):
        print(json.dumps(told, indent=2))
        return
    print(_result(told))
    rows = [
        [str(trial["number"]), trial["state"], str(trial["value"]), _params(trial), trial["run_id"], trial["reason"]]
        for trial in told["trials"]
    ]
    print(format_table(("trial", "state", told["spec"].get("metric") or "value", "parameters", "run", "why"), rows))


def _stop(arguments: argparse.Namespace) -> None:
    print(discovery.find_running().stop_sweep(arguments.name)["state"])


def _delete(arguments: argparse.Namespace) -> None:
    discovery.find_running().delete_sweep(arguments.name)


def _sweep(arguments: argparse.Namespace) -> int:
    options = SweepSpec.options(Interface.SHELL)
    given = read_options(arguments, options)
    SweepSpec.make(given, Interface.SHELL)
    server = discovery.find_running()
    told = server.start_sweep(**_program(arguments.file, bool(given.get("resume"))), **given)
    name, said = told["name"], len(_ended(told))
    try:
        while told["state"] == "running":
            said = _say(told, said)
            told = server.sweep(name, told["version"], WAIT_S)
    except KeyboardInterrupt:
        server.stop_sweep(name)
        while told["state"] == "running":
            told = server.sweep(name, told["version"], WAIT_S)
    _say(told, said)
    print(json.dumps(told, indent=2) if arguments.json else _result(told))
    return {"finished": 0, "stopped": STOPPED}.get(told["state"], FAILED)


def _program(file: str | None, resumes: bool) -> dict[str, Any]:
    if file is None:
        if not resumes:
            raise UsageError("which script? jupyter llmcloud sweep FILE.py, or --name NAME --resume.")
        return {}
    path = Path(os.path.abspath(os.path.expanduser(file)))
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: it cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    cell = {"code": source, "filename": str(path), "folder": os.getcwd()}
    return {"source": source, "cell": cell}


def _say(told: Mapping[str, Any], said: int) -> int:
    """Tell of trials that have ended since; returns how many have."""
    ended = _ended(told)
    for trial in ended[said:]:
        line = (
            f"trial {trial['number']}  {trial['state']}  {trial['value']}  {_params(trial)}  {trial['reason']}".rstrip()
        )
        print(line, file=sys.stderr, flush=True)
    return len(ended)


def _params(trial: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in trial["params"].items())


def _ended(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Trials that have, also before a sweep went on, in their order."""
    return sorted((trial for trial in told["trials"] if trial["ended"]), key=lambda trial: float(trial["ended"]))


def _result(told: Mapping[str, Any]) -> str:
    lines = [f"sweep  {told['name']}", f"state  {told['state']}", *([told["reason"]] if told["reason"] else [])]
    if told["state"] == "stopped":
        lines.append(f"what is done is kept: jupyter llmcloud sweep --name {told['name']} --resume goes on.")
    if (best := told["best"]) is not None:
        lines += [f"best   {best['value']}", f"run    {best['run_id']}"]
        lines += [f"{name}  {value}" for name, value in best["params"].items()]
    return "\n".join(lines)
