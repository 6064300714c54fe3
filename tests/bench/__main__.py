"""`python -m tests.bench [axis...]`: measure, print the table, keep it with its samples in test-output/."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import (
    balance,
    data,
    dispatch,
    gateway,
    local_cells,
    logs,
    panels,
    resize,
    scale,
    serving,
    slow_link,
    start,
    sweep,
    throughput,
)
from tests.bench.measured import Row, table
from tests.bench.shell import REPOSITORY

AXES: dict[str, Callable[[Path], list[Row]]] = {
    "dispatch": dispatch.measure,
    "start": start.measure,
    "logging": logs.measure,
    "throughput": throughput.measure,
    "resize": resize.measure,
    "balance": balance.measure,
    "panels": panels.measure,
    "gateway": gateway.measure,
    "cells": local_cells.measure,
    "serving": serving.measure,
    "data": data.measure,
    "sweep": sweep.measure,
    "scale": scale.measure,
    "slow-link": slow_link.measure,
}
ONLY_BY_NAME = ("scale", "sweep")  # what takes the whole machine for long


def main() -> int:
    """0 when every goal was reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="The product beside its peers.")
    parser.add_argument(
        "axes", nargs="*", metavar="axis", help=f"{', '.join(AXES)} (default: all but {', '.join(ONLY_BY_NAME)})"
    )
    parser.add_argument(
        "--peers", default=",".join(serving.PEERS), help="whom serving is measured beside (default: %(default)s)"
    )
    arguments = parser.parse_args()
    axes, peers = (
        arguments.axes or [axis for axis in AXES if axis not in ONLY_BY_NAME],
        [name for name in arguments.peers.split(",") if name],
    )
    if unknown := [axis for axis in axes if axis not in AXES]:
        parser.error(f"unknown axis {unknown[0]!r}: expected one of {', '.join(AXES)}")
    if unknown := [name for name in peers if name not in serving.PEERS]:
        parser.error(f"unknown peer {unknown[0]!r}: expected some of {','.join(serving.PEERS)}")
    measures = AXES | {"serving": functools.partial(serving.measure, peers=peers)}
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, _interrupt)
    # Short, since a unix socket's path holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for axis in axes:
            print(f"measuring {axis} ...", file=sys.stderr, flush=True)
            began = time.monotonic()
            rows += measures[axis](Path(folder) / axis)
            print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    print(f"\nsamples: {_keep(rows).relative_to(REPOSITORY)}")
    return 1 if any(row.reached is False for row in rows) else 0


def _interrupt(*_: Any) -> None:
    """Asked to end, it ends as by Ctrl-C: servers that it has stopped meanwhile go on, and end."""
    raise KeyboardInterrupt


def _keep(rows: list[Row]) -> Path:
    path = REPOSITORY / "test-output" / "bench.json"
    path.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
    document = {"machine": machine, "rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
