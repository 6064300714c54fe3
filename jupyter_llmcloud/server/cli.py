"""`jupyter llmcloud`: what the magics do, from a terminal.

`serve` runs a server of its own in the foreground; the rest talks to the server that LLMCLOUD_SERVER_URL names, else to
the newest one that runs on this machine, and `run` to one of its own when there is none.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.follow_run import TerminalRun
from jupyter_llmcloud.client.terminal import in_terminal, with_escapes
from jupyter_llmcloud.core.names import parse_duration
from jupyter_llmcloud.core.options import did_you_mean, kind_and_options
from jupyter_llmcloud.core.output.columns import format_table
from jupyter_llmcloud.core.spec import RUN, EndpointSpec, Interface, KeySpec
from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.server.data_commands import add_data
from jupyter_llmcloud.server.manifest_command import add_manifests
from jupyter_llmcloud.server.model_commands import add_compress, add_explain, add_export
from jupyter_llmcloud.server.recorded.commands import add_records
from jupyter_llmcloud.server.rollout_commands import add_rollouts
from jupyter_llmcloud.server.run_command import add_options, add_run, read_options
from jupyter_llmcloud.server.sweeps.command import add_sweep, add_sweeps
from jupyter_llmcloud.storage.remote import run_copy
from jupyter_llmcloud.storage.runs import RunStore

COLUMNS = {
    "endpoints": ("name", "state", "target", "revision", "created", "reason"),
    "keys": ("id", "state", "scopes", "label", "created", "expires", "last_used"),
    "runs": ("run_id", "state", "world_size", "created", "ended"),
    "clusters": ("name", "kind", "state", "num_workers", "num_slots", "address", "created"),
    "worlds": ("world_id", "holder", "num_ranks", "state", "cluster", "started"),
}
SHOWN = {
    "runs": (
        "run_id", "name", "state", "created", "ended", "holder", "cluster", "world_size", "num_restarts", "progress",
        "metrics", "spec", "artifacts",
    ),
    "endpoints": (
        "name", "state", "reason", "created", "target", "model", "revision", "dtype", "num_replicas", "url", "cluster",
    ),
}  # fmt: skip
USAGE = ("day", "id", "label", "owner", "requests", "refused", "prompt_tokens", "generated_tokens", "last_used")
ALERTS = ("t", "id", "rule", "what")
MAX_LISTED = 100
MAX_RECORDS = 100_000  # the newest ones: more are not given at once
TIMES = ("created", "ended", "expires", "started", "last_used", "t")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when it was refused, 2 for a wrong argument."""
    words, passed_on = cut(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser().parse_known_args(words)
    if (more := getattr(arguments, "more", "")) and not any(word.startswith("-") for word in unknown):
        getattr(arguments, more).extend(unknown)  # argparse does not take those that stand behind an option
        unknown = []
    if unknown or (passed_on and arguments.noun != "run"):
        word = [*unknown, "--"][0]
        hint = " What is meant for the script comes after --." if arguments.noun == "run" else ""
        meant = did_you_mean(word, [flag for option in RUN.options for flag in option.flags]) if hint else ""
        parser().error(f"what does {word} mean?{meant}{hint}")
    arguments.passed_on = passed_on
    with_escapes(sys.stdout)
    try:
        status: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except LLMCloudError as error:
        print(in_terminal(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        return 128 + signal.SIGPIPE
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
    add_data(nouns)
    add_sweep(nouns)
    add_sweeps(nouns)
    add_explain(nouns)
    add_compress(nouns)
    add_export(nouns)
    add_manifests(nouns)
    _add_serve(nouns)
    _add_mcp(nouns)
    verbs = {noun: _add_noun(nouns, noun) for noun in COLUMNS}
    for noun, verb, run, text in (
        ("endpoints", "stop", _delete, "end an endpoint"),
        ("keys", "revoke", _delete, "end a key"),
        ("runs", "stop", _stop_run, "stop a run"),
        ("runs", "checkpoint", _checkpoint_run, "have a run save a checkpoint now"),
        ("runs", "delete", _delete, "remove a run that has ended"),
        ("runs", "fetch", _fetch_run, "have a run here that is at the URL which LLMCLOUD_ROOT names"),
        ("runs", "attach", _attach, "show all of a run, then follow it; Ctrl-C leaves it alone"),
        ("clusters", "stop", _delete, "end a cluster"),
        ("worlds", "stop", _delete, "end a world, whoever has it"),
    ):
        _add_verb(verbs[noun], noun, verb, run, text)
    for noun, verb, run, text in (
        ("endpoints", "show", _show, "all there is to know of an endpoint"),
        ("endpoints", "logs", _endpoint_logs, "what its replicas printed"),
        ("runs", "show", _show, "all there is to know of a run"),
        ("runs", "logs", _run_logs, "what its ranks printed"),
        ("runs", "metrics", _run_metrics, "what its ranks measured, the newest values"),
        ("worlds", "stacks", _stacks, "what its ranks are doing now, and where"),
    ):
        _add_json(_add_verb(verbs[noun], noun, verb, run, text))
    add_rollouts(verbs["endpoints"])
    add_records(verbs["runs"])
    _add_keys(verbs["keys"])
    _add_clusters(verbs["clusters"])
    return top


def _add_serve(nouns: Any) -> None:
    command = nouns.add_parser("serve", help="serve a run or a model folder until Ctrl-C")
    command.add_argument("target", metavar="PATH", help="a folder in the Hugging Face layout, or a run")
    command.add_argument("--port", type=int, default=0, help="default: any free one")
    command.add_argument("--ip", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all (default: 127.0.0.1)")
    command.add_argument("--certfile", default="", metavar="FILE", help="certificate (PEM): answer by HTTPS")
    command.add_argument("--keyfile", default="", metavar="FILE", help="its private key, when that is another file")
    add_options(command, EndpointSpec.options(Interface.SHELL))
    command.set_defaults(run=_serve, noun="serve")


def _add_mcp(nouns: Any) -> None:
    command = nouns.add_parser("mcp", help="tools of the Model Context Protocol, on standard input and output")
    command.add_argument("--allow-changes", action="store_true", help="also those that stop and scale something")
    command.set_defaults(run=_serve_tools, noun="mcp")


def _add_noun(nouns: Any, noun: str) -> Any:
    command = nouns.add_parser(noun, help=f"list, ... {noun} of the running server")
    verbs = command.add_subparsers(metavar="VERB")
    verb = verbs.add_parser("list", help=f"the {noun}")
    for parser in (command, verb):
        _add_json(parser)
        parser.set_defaults(run=_list, noun=noun)
        if noun == "runs":
            words = "each trial of a sweep, too, and not the sweep as one row"
            parser.add_argument("--trials", action="store_true", default=argparse.SUPPRESS, help=words)
    return verbs


def _add_verb(verbs: Any, noun: str, verb: str, run: Callable[..., int | None], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = verbs.add_parser(verb, help=text)
    command.add_argument("name", metavar="ID" if noun == "keys" else "NAME")
    command.set_defaults(run=run, noun=noun)
    return command


def _add_json(command: argparse.ArgumentParser) -> None:
    # Without a default, or that of a verb would undo what was said before it.
    command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON, with all there is")


def _add_keys(verbs: Any) -> None:
    command = verbs.add_parser("create", help="make a key and print it, once")
    command.add_argument("--scope", action="append", help="infer:NAME (with * and ?) or models:read; repeatable")
    command.add_argument("--expires", type=parse_duration, help="for example 12h or 30d")
    command.add_argument("--label")
    add_options(command, KeySpec.options(Interface.SHELL))
    command.set_defaults(run=_create_key, noun="keys")
    command = _add_verb(verbs, "keys", "rotate", _rotate_key, "make a key in place of one, and print it, once")
    command.add_argument("--overlap", type=parse_duration, help="how long the old key stays valid (1h)")
    command = verbs.add_parser("usage", help="what was asked with each key, by day")
    command.add_argument("--days", type=int, help="of how many days (30)")
    command.add_argument("--csv", action="store_true", help="as comma-separated values, for a spreadsheet")
    _add_json(command)
    command.set_defaults(run=_key_usage, noun="keys")
    command = verbs.add_parser("alerts", help="what was unusual in the use of keys")
    _add_json(command)
    command.set_defaults(run=_key_alerts, noun="keys")


def _add_clusters(verbs: Any) -> None:
    command = verbs.add_parser("start", help="start a cluster")
    command.add_argument("kind", nargs="?", default="local")
    command.add_argument("option", nargs="*", metavar="KEY=VALUE", help="what clusters of this kind take")
    command.add_argument("--workers", type=int)
    command.add_argument("--name")
    command.set_defaults(run=_start_cluster, noun="clusters", more="option")
    command = verbs.add_parser("connect", help="use a Dask cluster that somebody else has started")
    command.add_argument("address", metavar="ADDRESS")
    command.add_argument("--name")
    command.set_defaults(run=_connect_cluster, noun="clusters")
    command = _add_verb(verbs, "clusters", "scale", _scale_cluster, "have N workers")
    command.add_argument("workers", metavar="N", type=int)
    command = _add_verb(verbs, "clusters", "adapt", _adapt_cluster, "have between MIN and MAX workers, by the load")
    command.add_argument("minimum", metavar="MIN", type=int)
    command.add_argument("maximum", metavar="MAX", type=int)


def _serve(arguments: argparse.Namespace) -> int:
    from jupyter_llmcloud.server.headless.__main__ import skip_slow_imports

    skip_slow_imports()
    from jupyter_llmcloud.server.headless.foreground import serve
    from jupyter_llmcloud.server.headless.listener import Listener

    spec = EndpointSpec.make(read_options(arguments, EndpointSpec.options(Interface.SHELL)))
    listener = Listener(arguments.port, arguments.ip, arguments.certfile, arguments.keyfile)
    return serve(arguments.target, spec, listener)


def _serve_tools(arguments: argparse.Namespace) -> None:
    from jupyter_llmcloud.client import mcp_server

    mcp_server.serve(arguments.allow_changes)


def _list(arguments: argparse.Namespace) -> None:
    noun, server = arguments.noun, discovery.find_running()
    if noun == "runs" and not {"json", "trials"} & set(vars(arguments)):
        rows = server.runs_and_sweeps(MAX_LISTED)
    else:
        rows = server.ask("GET", noun)[noun]
    if not _print_json(arguments, rows):
        columns = COLUMNS[noun]
        print(format_table(columns, [[_cell(column, row.get(column)) for column in columns] for row in rows]))


def _show(arguments: argparse.Namespace) -> None:
    told = discovery.find_running().ask("GET", f"{arguments.noun}/{quote(arguments.name, safe='')}")
    if not _print_json(arguments, told):
        rows = [[name, _cell(name, told.get(name))] for name in SHOWN[arguments.noun]]
        rows += [["note", entry["why"]] for entry in told.get("history", []) if "why" in entry]
        for row in told.get("errors", []):
            rows.append(["error", ": ".join(filter(None, (f"rank {row['rank']}", row["ename"], row["evalue"])))])
        if why := told.get("diagnosis"):
            rows += [["why", why["sentence"]], ["try", why["action"]]]
        print(format_table(["", ""], [row for row in rows if row[1]]).lstrip("\n"))


def _print_json(arguments: argparse.Namespace, told: Any) -> bool:
    """Print it so when that is wished."""
    if wished := getattr(arguments, "json", False):
        print(json.dumps(told, indent=2))
    return wished


def _delete(arguments: argparse.Namespace) -> None:
    discovery.find_running().ask("DELETE", f"{arguments.noun}/{quote(arguments.name, safe='')}")


def _stop_run(arguments: argparse.Namespace) -> None:
    print(discovery.find_running().ask("POST", f"runs/{quote(arguments.name, safe='')}/stop", {})["state"])


def _fetch_run(arguments: argparse.Namespace) -> None:
    print(run_copy.fetch(RunStore(), arguments.name).path)


def _checkpoint_run(arguments: argparse.Namespace) -> None:
    print(f"step {discovery.find_running().checkpoint_run(arguments.name)['step']}")


def _attach(arguments: argparse.Namespace) -> int:
    server = discovery.find_running()
    run_id = server.run(arguments.name)["run_id"]
    return TerminalRun(server, server.run_folder(run_id), is_ours=False).follow()


def _endpoint_logs(arguments: argparse.Namespace) -> None:
    rows = discovery.find_running().endpoint_logs(arguments.name)
    if not _print_json(arguments, rows):
        for row in rows:
            sys.stdout.write(row["text"])


def _run_logs(arguments: argparse.Namespace) -> None:
    server = discovery.find_running()
    if getattr(arguments, "json", False):
        _print_json(arguments, server.run_logs(arguments.name, limit=MAX_RECORDS))
        return
    for piece in server.run_log(arguments.name):
        sys.stdout.write(piece)


def _run_metrics(arguments: argparse.Namespace) -> None:
    records = discovery.find_running().run_metrics(arguments.name)
    if not _print_json(arguments, records):
        rows = [
            [str(record["step"]), str(record["rank"]), name, record.get("not_finite", {}).get(name) or f"{value:.6g}"]
            for record in records
            for name, value in record.get("values", {}).items()
        ]
        print(format_table(["step", "rank", "metric", "value"], rows))


def _stacks(arguments: argparse.Namespace) -> None:
    told = discovery.find_running().world_stacks(arguments.name)
    if not _print_json(arguments, told):
        print("\n".join(told["lines"]))


def _create_key(arguments: argparse.Namespace) -> None:
    scopes = arguments.scope or ["infer:*", "models:read"]
    limits = read_options(arguments, KeySpec.options(Interface.SHELL))
    print(discovery.find_running().create_key(scopes, arguments.expires, arguments.label, **limits)["key"])


def _rotate_key(arguments: argparse.Namespace) -> None:
    print(discovery.find_running().rotate_key(arguments.name, arguments.overlap)["key"])


def _key_usage(arguments: argparse.Namespace) -> None:
    rows = discovery.find_running().key_usage(arguments.days)
    if arguments.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(USAGE)
        writer.writerows([[_spreadsheet_cell(row[name]) for name in USAGE] for row in rows])
    elif not _print_json(arguments, rows):
        print(format_table(USAGE, [[_cell(name, row[name]) for name in USAGE] for row in rows]))


def _spreadsheet_cell(value: Any) -> Any:
    """A text that no spreadsheet takes for a formula: whoever mints a key chooses its label."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _key_alerts(arguments: argparse.Namespace) -> None:
    rows = discovery.find_running().key_alerts()
    if not _print_json(arguments, rows):
        print(format_table(ALERTS, [[_cell(name, row[name]) for name in ALERTS] for row in rows]))


def _start_cluster(arguments: argparse.Namespace) -> None:
    kind, options = kind_and_options([arguments.kind, *arguments.option], "clusters start")
    print(discovery.find_running().start_cluster(kind, arguments.name, arguments.workers, options)["name"])


def _connect_cluster(arguments: argparse.Namespace) -> None:
    print(discovery.find_running().connect_cluster(arguments.address, arguments.name)["name"])


def _scale_cluster(arguments: argparse.Namespace) -> None:
    _tell_workers(discovery.find_running().scale_cluster(arguments.name, arguments.workers))


def _adapt_cluster(arguments: argparse.Namespace) -> None:
    _tell_workers(discovery.find_running().adapt_cluster(arguments.name, arguments.minimum, arguments.maximum))


def _tell_workers(record: dict[str, Any]) -> None:
    print(f"{record['name']}  {record['num_workers']} workers")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in TIMES:
        return datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
