"""`jupyter llmcloud runs export` and `compare`: recorded runs as scripts, and beside each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.core.names import parse_script_file
from jupyter_llmcloud.core.options import number
from jupyter_llmcloud.core.output.columns import format_table
from jupyter_llmcloud.core.output.numerals import format_step
from jupyter_llmcloud.errors import UsageError


def add_records(verbs: Any) -> None:
    """The commands, among the verbs of runs."""
    command = verbs.add_parser("export", help="write a run as a plain script that gives the same losses")
    command.add_argument("name", metavar="NAME")
    command.add_argument("file", metavar="FILE.py")
    command.set_defaults(run=_export, noun="runs")
    command = verbs.add_parser("compare", help="what differs between runs: options, versions, metrics, code")
    command.add_argument("names", metavar="NAME", nargs="+")
    command.add_argument("--tolerance", default="0", metavar="X", help="values of metrics are the same within this (0)")
    command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON, with all there is")
    command.set_defaults(run=_compare, noun="runs", more="names")


def _export(arguments: argparse.Namespace) -> None:
    write_script(discovery.find_running(), arguments.name, arguments.file)


def write_script(server: ServerClient, name: str, file: str) -> None:
    """Have the server write a run as a script, keep it here, and say how it is launched. Raises UsageError."""
    script = server.run_script(name, parse_script_file(file))
    try:
        Path(file).write_text(script["text"], encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}.") from None
    print(f"{file} gives the losses of {name} with any of", *(f"    {line}" for line in script["launches"]), sep="\n")
    print(*script["notes"], sep="\n", end="\n" if script["notes"] else "")


def _compare(arguments: argparse.Namespace) -> None:
    found = discovery.find_running().compare_runs(arguments.names, number(0)(arguments.tolerance))
    if getattr(arguments, "json", False):
        print(json.dumps(found, indent=2))
        return
    rows = [[fact["name"], *map(_shown, fact["values"]), ""] for fact in found["facts"]]
    for metric in found["metrics"]:
        step = metric["apart_from"]
        apart = "the same" if step is None else f"apart from step {format_step(step)}"
        rows.append([f"{metric['name']} (last)", *map(_shown, metric["last"]), apart])
    print(format_table(["", *found["runs"], ""], rows))
    for difference in filter(None, found["code"]):
        print(f"\n{difference}")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
