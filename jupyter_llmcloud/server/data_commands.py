"""`jupyter llmcloud prepare` and `shards`: data without a notebook."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from jupyter_llmcloud.client import discovery
from jupyter_llmcloud.client.rest import MAX_WAIT_S
from jupyter_llmcloud.core.data.spec import PREPARE, PrepareSpec
from jupyter_llmcloud.core.spec import Interface
from jupyter_llmcloud.server.run_command import add_options, read_options
from jupyter_llmcloud.storage.datasets import manifest

_TOLD = ("out", "rows", "tokens", "documents", "dropped", "num_shards", "num_new_shards", "fingerprint")


def add_data(nouns: Any) -> None:
    """The commands and their options."""
    command = nouns.add_parser("prepare", help="prepare data on a cluster of the running server; Ctrl-C stops it")
    command.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders, globs or URLs")
    add_options(command, PrepareSpec.options(Interface.SHELL))
    command.add_argument("--json", action="store_true", help="the result as JSON")
    command.set_defaults(run=_prepare, noun="prepare", more="source")
    command = nouns.add_parser("shards", help="the shards of prepared data")
    command.add_argument("url", metavar="URL")
    command.add_argument("--json", action="store_true", help="as JSON, with all there is")
    command.set_defaults(run=_shards, noun="shards")


def _absolute(place: str) -> str:
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def _prepare(arguments: argparse.Namespace) -> int:
    spec = PrepareSpec.make(read_options(arguments, PREPARE.options)).checked()
    body = {**spec.as_dict(), "out": _absolute(str(spec.out))}
    if spec.tokenizer and os.path.exists(os.path.expanduser(spec.tokenizer)):
        body["tokenizer"] = _absolute(spec.tokenizer)
    server = discovery.find_running()
    told = server.prepare_data([_absolute(place) for place in arguments.source], **body)
    phase = ""
    try:
        while told["state"] == "running":
            if (now := f"{told['phase']}: {told['total']} parts") != phase:
                print(phase := now, file=sys.stderr, flush=True)
            told = server.preparation(told["id"], told["version"], MAX_WAIT_S)
    except KeyboardInterrupt:
        server.stop_preparation(told["id"])
        raise
    if told["state"] != "finished":
        print(f"{told['error'] or told['state']}: {told['reason']}", file=sys.stderr)
        return 1
    result = {name: told[name] for name in _TOLD}
    print(json.dumps(result, indent=2) if arguments.json else "\n".join(f"{k}  {v}" for k, v in result.items()))
    return 0


def _shards(arguments: argparse.Namespace) -> None:
    import msgspec

    found = manifest.read(_absolute(arguments.url))
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found.shards), indent=2).decode())
        return
    for shard in found.shards:
        print(f"{shard.name}  {shard.num_rows} rows  {shard.tokens} tokens  {shard.bytes} bytes  {shard.host}")
    print(f"{len(found.shards)} shards  {found.num_rows} rows  {found.num_tokens} tokens")
