"""`jupyter llmcloud`: what the magics do, from a terminal.

`serve` runs a server of its own in the foreground; the rest talks to the server that LLMCLOUD_SERVER_URL names, else to
the newest one that runs on this machine, and `run` to one of its own when there is none.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.follow_run import FollowedRun
from jupyter_llmcloud.core.names import parse_duration
from jupyter_llmcloud.core.spec import EndpointSpec, Interface
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.server.run_command import add_options, add_run, read_options

COLUMNS = {
    "endpoints": ("name", "state", "target", "revision", "created", "reason"),
    "keys": ("id", "state", "scopes", "label", "created", "expires"),
    "runs": ("run_id", "state", "world_size", "created", "ended"),
    "clusters": ("name", "kind", "state", "num_workers", "num_slots", "address", "created"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when it was refused, 2 for a wrong argument."""
    words, passed_on = cut(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser().parse_known_args(words)
    if unknown or (passed_on and arguments.noun != "run"):
        hint = " What is meant for the script comes after --." if arguments.noun == "run" else ""
        parser().error(f"what does {[*unknown, '--'][0]} mean?{hint}")
    arguments.passed_on = passed_on
    try:
        status: int | None = arguments.run(arguments)
    except LLMCloudError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0


def cut(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and those behind it."""
    at = [*words, "--"].index("--")
    return list(words[:at]), list(words[at + 1 :])


def parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    top = argparse.ArgumentParser(prog="jupyter llmcloud", description=__doc__.partition("\n")[0])
    nouns = top.add_subparsers(required=True, metavar="COMMAND")
    add_run(nouns)
    _add_serve(nouns)
    verbs = {noun: _add_noun(nouns, noun) for noun in COLUMNS}
    for noun, verb, run, text in (
        ("endpoints", "stop", _delete, "end an endpoint"),
        ("endpoints", "logs", _endpoint_logs, "what its replicas printed"),
        ("keys", "revoke", _delete, "end a key"),
        ("runs", "stop", _stop_run, "stop a run"),
        ("runs", "delete", _delete, "remove a run that has ended"),
        ("runs", "attach", _attach, "show all of a run, then follow it; Ctrl-C leaves it alone"),
        ("runs", "logs", _run_logs, "what its ranks printed"),
        ("clusters", "stop", _delete, "end a cluster"),
    ):
        command = verbs[noun].add_parser(verb, help=text)
        command.add_argument("name", metavar="ID" if noun == "keys" else "NAME")
        command.set_defaults(run=run, noun=noun)
    _add_create_key(verbs["keys"])
    _add_start_cluster(verbs["clusters"])
    return top


def _add_serve(nouns: Any) -> None:
    command = nouns.add_parser("serve", help="serve a run or a model folder until Ctrl-C")
    command.add_argument("target", metavar="PATH", help="a folder in the Hugging Face layout, or a run")
    command.add_argument("--port", type=int, default=0, help="default: any free one")
    add_options(command, EndpointSpec.options(Interface.SHELL))
    command.set_defaults(run=_serve, noun="serve")


def _add_noun(nouns: Any, noun: str) -> Any:
    command = nouns.add_parser(noun, help=f"list, ... {noun} of the running server")
    verbs = command.add_subparsers(metavar="VERB")
    verb = verbs.add_parser("list", help=f"the {noun}")
    for parser in (command, verb):
        parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON, with all there is")
        parser.set_defaults(run=_list, noun=noun)
    return verbs


def _add_create_key(verbs: Any) -> None:
    command = verbs.add_parser("create", help="make a key and print it, once")
    command.add_argument("--scope", action="append", help="infer:NAME (with * and ?) or models:read; repeatable")
    command.add_argument("--expires", type=parse_duration, help="for example 12h or 30d")
    command.add_argument("--label")
    command.set_defaults(run=_create_key, noun="keys")


def _add_start_cluster(verbs: Any) -> None:
    command = verbs.add_parser("start", help="start a cluster")
    command.add_argument("kind", nargs="?", default="local")
    command.add_argument("--workers", type=int)
    command.add_argument("--name")
    command.set_defaults(run=_start_cluster, noun="clusters")


def _serve(arguments: argparse.Namespace) -> int:
    from jupyter_llmcloud.server.headless.__main__ import skip_slow_imports

    skip_slow_imports()
    from jupyter_llmcloud.server.headless.foreground import serve

    spec = EndpointSpec.make(read_options(arguments, EndpointSpec.options(Interface.SHELL)))
    return serve(arguments.target, spec, arguments.port)


def _list(arguments: argparse.Namespace) -> None:
    noun = arguments.noun
    rows = discovery.find_running().ask("GET", noun)[noun]
    if getattr(arguments, "json", False):
        print(json.dumps(rows, indent=2))
        return
    print(format_table(COLUMNS[noun], [[_cell(column, row.get(column)) for column in COLUMNS[noun]] for row in rows]))


def _delete(arguments: argparse.Namespace) -> None:
    discovery.find_running().ask("DELETE", f"{arguments.noun}/{quote(arguments.name, safe='')}")


def _stop_run(arguments: argparse.Namespace) -> None:
    print(discovery.find_running().ask("POST", f"runs/{quote(arguments.name, safe='')}/stop", {})["state"])


def _attach(arguments: argparse.Namespace) -> int:
    server = discovery.find_running()
    run_id = server.run(arguments.name)["run_id"]
    return FollowedRun(server, server.run_folder(run_id), is_ours=False).follow()


def _endpoint_logs(arguments: argparse.Namespace) -> None:
    for row in discovery.find_running().ask("GET", f"endpoints/{quote(arguments.name, safe='')}/logs")["logs"]:
        sys.stdout.write(row["text"])


def _run_logs(arguments: argparse.Namespace) -> None:
    for record in discovery.find_running().ask("GET", f"runs/{quote(arguments.name, safe='')}/logs")["records"]:
        if "text" in record:
            print(f"[{record['rank']}] {record['text']}", end="" if record["text"].endswith("\n") else "\n")


def _create_key(arguments: argparse.Namespace) -> None:
    scopes = arguments.scope or ["infer:*", "models:read"]
    body = {"scopes": scopes, "expires_s": arguments.expires, "label": arguments.label}
    print(discovery.find_running().ask("POST", "keys", body)["key"])


def _start_cluster(arguments: argparse.Namespace) -> None:
    body = {"kind": arguments.kind, "workers": arguments.workers, "name": arguments.name}
    print(discovery.find_running().ask("POST", "clusters", body)["name"])


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in ("created", "ended", "expires"):
        return datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M:%S")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def format_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; control characters cannot reach the terminal."""
    table = [list(headings), *([_printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


if __name__ == "__main__":
    sys.exit(main())
