"""Run the drivers named on the command line, or all of them; exit status 1 when a promise did not hold."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

DRIVERS = (
    "stops",
    "starts",
    "checkpoints",
    "leaders",
    "elastic",
    "serving",
    "soak",
    "fuzz",
    "marked",
    "detect",
    "diagnose",
    "eta",
    "preflight",
    "held_out",
)


def main(names: list[str]) -> int:
    """Each driver prints its own line; `elastic:25:15` gives one its arguments."""
    folder = Path(tempfile.mkdtemp(prefix="llmc-"))
    os.environ.update(LLMCLOUD_ROOT=str(folder / "root"), LLMCLOUD_RUNTIME_DIR=str(folder / "run"), HF_HUB_OFFLINE="1")
    broken = []
    for name in names or DRIVERS:
        began = time.monotonic()
        driver, *arguments = name.split(":")
        if not importlib.import_module(f"tests.chaos.{driver}").main(*map(float, arguments)):
            broken.append(name)
        print(f"  ({name} took {time.monotonic() - began:.0f} s)", flush=True)
    if broken:
        print(f"broken promises: {', '.join(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
