"""`jupyter llmcloud run`: a script as a run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import tokenize
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.accelerate_file import with_content
from jupyter_llmcloud.client.follow_run import TerminalRun
from jupyter_llmcloud.client.preflight import RANKS, CellText, Report, check_options, dry_run, rehearse
from jupyter_llmcloud.client.rest import ServerClient
from jupyter_llmcloud.core.options import Option
from jupyter_llmcloud.core.parallel.accelerate_config import of_option
from jupyter_llmcloud.core.spec import RUN, Interface, RunSpec
from jupyter_llmcloud.errors import ConnectionLost, UsageError
from jupyter_llmcloud.server.recorded.commands import write_script
from jupyter_llmcloud.storage.recorded.export import check

DESCRIPTION = """\
Run a script on the ranks of a new world, which ends with it, as `python FILE.py` would run it on each of them: on the
cluster of the running server, or on one of this machine. Ctrl-C stops it; pressed again, harder. The exit status is 0
when it has finished, 130 when it was stopped, else the script's own or 1."""
EPILOG = "What follows -- goes to the script: jupyter llmcloud run train.py -n 2 -- --lr 3e-4"


def add_run(nouns: Any) -> None:
    """The command and its options."""
    command = nouns.add_parser(
        "run",
        help="run a script on many ranks",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("file", nargs="?", metavar="FILE.py", help="the script; left out, that of --resume RUN")
    add_options(command, RUN.options)
    command.set_defaults(run=_run, noun="run")


def add_options(command: argparse.ArgumentParser, options: tuple[Option, ...]) -> None:
    """Options of a spec; one that is left out is not given."""
    for option in options:
        if option.takes_value:
            command.add_argument(
                *option.flags,
                action="append" if option.repeat else "store",
                metavar=option.metavar or "|".join(option.values),
                help=option.help.replace("%", "%%"),
            )
        else:
            command.add_argument(*option.flags, action="store_true", default=None, help=option.help)


def read_options(arguments: argparse.Namespace, options: tuple[Option, ...]) -> dict[str, Any]:
    """Those that were given, checked. Raises UsageError that names the option."""
    given = {}
    for option in options:
        if (value := getattr(arguments, option.name)) is not None:
            text = ",".join(value) if option.repeat else value
            given[option.name] = option.read(text, option.flags[-1]) if option.takes_value else value
    return given


def _run(arguments: argparse.Namespace) -> int:
    given, notes = with_content(read_options(arguments, RUN.options))
    spec = RunSpec.make(given, Interface.SHELL)
    for note in notes:
        print(note, file=sys.stderr)
    source, script = _program(arguments, spec)
    if spec.dry_run or spec.rehearse:
        return _preflight(source, script, spec)
    given.setdefault("name", _name(script["file"]))
    if spec.export:
        check(source, spec, spec.resume is not None)
    asked = {name: value for name, value in given.items() if name not in ("background", "export")}
    server, told = _start(source, asked, script)
    for note in told["notes"]:
        print(note, file=sys.stderr)
    if spec.background:
        print(told["run_id"])
        return 0
    print(f"{told['run_id']} begins.", file=sys.stderr, flush=True)
    status = TerminalRun(server, server.run_folder(told["run_id"])).follow()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one press too many must not change the exit status
    if spec.export and not status:
        write_script(server, told["run_id"], spec.export)
    return status


def _preflight(source: str, script: dict[str, Any], spec: RunSpec) -> int:
    """Say what was found before anything starts; 1 when the script would not fit, hang or fail."""
    for line in check_options(spec):
        print(line, file=sys.stderr, flush=True)
    shown = os.path.basename(script["file"])
    part = {"filename": script["file"], "shown": shown, "line_offset": 0, "code": source}
    text = CellText([part], script["arguments"], script["folder"])
    file = of_option(spec.accelerate_config)
    precision, found = spec.precision or file.precision, list[Report]()
    if spec.rehearse:
        found.append(rehearse(text, precision))
    if spec.dry_run:
        found.append(dry_run(text, spec.plan or file.plan or None, spec.nproc or RANKS, precision))
    for report in found:
        print(*report.lines, sep="\n", flush=True)
    return 0 if all(report.is_good for report in found) else 1


def _program(arguments: argparse.Namespace, spec: RunSpec) -> tuple[str, dict[str, Any]]:
    """The source and what is known of its script."""
    folder = os.getcwd()
    if arguments.file is not None:
        try:
            with tokenize.open(arguments.file) as opened:  # in the encoding that it names, as Python reads it
                source = opened.read()
        except (OSError, UnicodeDecodeError, SyntaxError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{arguments.file} cannot be read: {reason}.") from None
        file = os.path.abspath(arguments.file)
        return source, {"file": file, "arguments": arguments.passed_on, "folder": folder}
    if spec.resume is None:
        raise UsageError("which script? jupyter llmcloud run FILE.py, or --resume RUN to go on with an earlier one.")
    earlier = discovery.find_running().run(spec.resume)
    script = earlier["script"]
    if not script.get("file"):
        raise UsageError(
            f"--resume {spec.resume}: {earlier['run_id']} was a cell of a notebook. "
            "Name the script to go on with, or resume it there: %%distribute --resume."
        )
    return earlier["source"], {**script, "arguments": arguments.passed_on or script["arguments"]}


def _name(file: str) -> str:
    """A run is named like its script, with what a name may hold."""
    stem = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in Path(file).stem
    )
    return stem.lstrip("._-")[:64] or "script"


def _start(source: str, spec: dict[str, Any], script: dict[str, Any]) -> tuple[ServerClient, dict[str, Any]]:
    """On the running server, else on one of our own."""
    if (server := discovery.running_server()) is not None:
        try:
            return server, server.start_run(source, spec, script)
        except ConnectionLost:  # it has just ended, unless it was named
            if os.environ.get(config.ENV_SERVER_URL):
                raise
    print("Starting a server and a cluster on this machine ...", file=sys.stderr, flush=True)
    server = discovery.headless_server(for_world=True)
    return server, server.start_run(source, spec, script)
