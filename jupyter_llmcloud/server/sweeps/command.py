"""`jupyter llmcloud sweep`: a script with `trial.suggest_...` as many trials, without a notebook."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_llmcloud.client import discovery
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
        params = " ".join(f"{name}={value}" for name, value in trial["params"].items())
        line = f"trial {trial['number']}  {trial['state']}  {trial['value']}  {params}  {trial['reason']}".rstrip()
        print(line, file=sys.stderr, flush=True)
    return len(ended)


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
