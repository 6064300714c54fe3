"""A Jupyter server with nothing but our routes, for a kernel that has no Jupyter server, or for a terminal.

    python -m jupyter_llmcloud.server.headless --owner-pid PID --owner-started TIME --announce FILE

Its token comes in the environment (never in the arguments, which anybody can list). It tells its URL in FILE, and ends
when its owner has been gone for the length of its lease and no run of its clusters is active any more.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

import psutil

from jupyter_llmcloud import config
from jupyter_llmcloud.cluster import agent_launcher


def main() -> None:
    """Serve until the owner has gone."""
    parser = argparse.ArgumentParser(prog="jupyter_llmcloud.server.headless")
    parser.add_argument("--owner-pid", type=int, required=True)
    parser.add_argument("--owner-started", type=float)
    parser.add_argument("--announce", type=Path)
    parser.add_argument("--for-world", action="store_true", help="start the agent of the local cluster at once")
    arguments = parser.parse_args()
    pid = arguments.owner_pid
    started = arguments.owner_started or psutil.Process(pid).create_time()
    path = arguments.announce or config.runtime_dir() / f"headless-{pid}.json"
    token = os.environ.pop(config.ENV_SERVER_TOKEN, "") or secrets.token_urlsafe(32)
    begun_cluster_id = ""
    if arguments.for_world:
        begun_cluster_id = secrets.token_hex(4)
        agent_launcher.start_ahead(begun_cluster_id, 1)
    skip_slow_imports()
    from jupyter_llmcloud.server.headless.app import serve

    serve(pid, started, path, token, begun_cluster_id)


def skip_slow_imports() -> None:
    """Have jsonschema do without its check of IRIs: that parses a grammar for a second, and no schema here uses it."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
