"""`jupyter llmcloud endpoints ...`: what changes an endpoint while it answers."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.core.names import parse_replicas
from jupyter_llmcloud.core.output.columns import format_table
from jupyter_llmcloud.core.serving.endpoint.comparison import in_words
from jupyter_llmcloud.core.serving.endpoint.rollout import parse_shares


def add_rollouts(verbs: Any) -> None:
    """The verbs, below `jupyter llmcloud endpoints`."""
    _add(verbs, "scale", _scale, "have more or fewer replicas", ("replicas", "K|MIN:MAX", {}))
    update = _add(verbs, "update", _update, "serve another model under the same name", ("target", "TARGET", {}))
    update.add_argument("--canary", type=int, metavar="PERCENT", help="give it so much, beside what is served now")
    _add(verbs, "split", _split, "share requests out: stable:95,canary:5", ("shares", "SHARES", {}))
    _add(verbs, "rollback", _roll_back, "without the canary, or back to the revision before this one")
    shadow = ("revision", "REVISION", {"nargs": "?"})
    _add(verbs, "shadow", _shadow, "copy requests to a revision, a run or a folder; alone, end that", shadow)
    adapter = _add(verbs, "add-adapter", _add_adapter, "load an adapter beside the model", ("target", "PATH", {}))
    adapter.add_argument("--name", dest="adapter", metavar="NAME", help="how it is asked for")
    _add(verbs, "remove-adapter", _remove_adapter, "take an adapter away", ("adapter", "ADAPTER", {}))
    for verb, run, text in (
        ("revisions", _revisions, "what it serves and has served, the newest first"),
        ("adapters", _adapters, "its adapters"),
    ):
        command = verbs.add_parser(verb, help=text)
        command.add_argument("name", metavar="NAME")
        command.add_argument("--json", action="store_true", help="as JSON, with all there is")
        command.set_defaults(run=run, noun="endpoints")


def _add(
    verbs: Any,
    verb: str,
    run: Callable[[argparse.Namespace], dict[str, Any]],
    text: str,
    *more: tuple[str, str, dict[str, Any]],
) -> argparse.ArgumentParser:
    def tell(arguments: argparse.Namespace) -> None:
        for row in run(arguments)["revisions"]:
            if row["role"] != "retired":
                print(f"revision {row['number']}  {row['role']}  {row['weight']} %  {row['target']}")

    command: argparse.ArgumentParser = verbs.add_parser(verb, help=text)
    command.add_argument("name", metavar="NAME")
    for dest, metavar, options in more:
        command.add_argument(dest, metavar=metavar, **options)
    command.set_defaults(run=tell, noun="endpoints")
    return command


def _revisions(given: argparse.Namespace) -> None:
    rows = discovery.find_running().endpoint(given.name)["revisions"][::-1]
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    table = [
        [str(row["number"]), row["role"], f"{row['weight']} %" if row["weight"] else "", row["target"], _noted(row)]
        for row in rows
    ]
    print(format_table(("revision", "role", "requests", "serves", "note"), table))


def _noted(row: dict[str, Any]) -> str:
    return in_words(row["comparison"]) if row.get("comparison") else str(row["note"] or "")


def _adapters(given: argparse.Namespace) -> None:
    names = [f"{given.name}:{adapter}" for adapter in discovery.find_running().endpoint(given.name)["adapters"]]
    print(json.dumps(names, indent=2) if given.json else "\n".join(names))


def _target(text: str) -> str:
    folder = os.path.expanduser(text)
    return os.path.abspath(folder) if os.path.isdir(folder) else text


def _scale(given: argparse.Namespace) -> dict[str, Any]:
    return discovery.find_running().scale_endpoint(given.name, parse_replicas(given.replicas))


def _update(given: argparse.Namespace) -> dict[str, Any]:
    return discovery.find_running().update_endpoint(given.name, _target(given.target), given.canary)


def _split(given: argparse.Namespace) -> dict[str, Any]:
    return discovery.find_running().split_endpoint(given.name, parse_shares(given.shares))


def _roll_back(given: argparse.Namespace) -> dict[str, Any]:
    return discovery.find_running().roll_back_endpoint(given.name)


def _shadow(given: argparse.Namespace) -> dict[str, Any]:
    revision = None if given.revision is None else _target(given.revision)
    return discovery.find_running().shadow_endpoint(given.name, revision)


def _add_adapter(given: argparse.Namespace) -> dict[str, Any]:
    return discovery.find_running().add_adapter(given.name, _target(given.target), given.adapter)


def _remove_adapter(given: argparse.Namespace) -> dict[str, Any]:
    return discovery.find_running().remove_adapter(given.name, given.adapter)
