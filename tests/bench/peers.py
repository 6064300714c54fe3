"""Where the peers live that must not live beside the product.

TensorBoard, W&B and trackio in the product's own environment would change what is measured and tested there: `Trainer`
reports to every tracker it can import. nbdistributed brings classic notebook with it. So the bench makes them an
environment of their own, on top of the one it runs in (torch is not installed twice), the first time one is asked for.
A peer that cannot live beside the others either, as servers that hold other versions, has one for itself. They stand
beside the bench's own environment, or where LLMCLOUD_BENCH_PEERS says.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.bench.shell import REPOSITORY

FOLDER = Path(os.environ.get("LLMCLOUD_BENCH_PEERS") or sys.prefix, "bench-peers")
CONSTRAINTS = REPOSITORY / ".ci" / "constraints.txt"
INSTALL_TIMEOUT_S = 900.0
# nbdistributed ends its workers, at the worst, by `pkill -f`, which also ends workers of others.
_HARMLESS_PKILL = "#!/bin/sh\nexit 0\n"


class PeerMissing(Exception):
    """A peer cannot be had here; the message says why."""


@functools.cache
def python_with(package: str, *, alone: str = "", without: tuple[str, ...] = ()) -> Path:
    """A Python that can import `package`; installs it first where it is missing.

    Args:
        package: as pip takes it.
        alone: name of an environment for it alone, where no version is held; "": the one of all peers.
        without: what it brings that does not fit the torch beneath.

    Raises:
        PeerMissing: it cannot be had here.
    """
    folder = FOLDER.with_name(f"{FOLDER.name}-{alone}") if alone else FOLDER
    python = folder / "bin" / "python"
    if not python.exists():
        _make(folder)
    stamp = folder / f"{re.sub(r'[^a-z0-9.-]+', '-', package)}.installed"
    wanted = package if alone else _pinned(package)
    if not stamp.exists() or stamp.read_text() != wanted:
        _install(python, wanted, [] if alone else ["-c", str(CONSTRAINTS)])
        if without:
            _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *without], f"{wanted}, the rest of it")
        stamp.write_text(wanted)
    return python


def _make(folder: Path) -> None:
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], "an environment for peers")
    for below in folder.glob("lib/python*/site-packages"):
        beneath = sysconfig.get_paths()["purelib"]
        (below / "beneath.pth").write_text(f"import site; site.addsitedir({beneath!r})\n")
    pkill = folder / "bin" / "pkill"
    pkill.write_text(_HARMLESS_PKILL)
    pkill.chmod(0o755)


def _pinned(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==.*$", CONSTRAINTS.read_text(), re.MULTILINE)
    return found.group() if found else package


def _install(python: Path, wanted: str, held: list[str]) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *held, wanted], wanted)


def _run(command: list[str], what: str) -> None:
    print(f"  installing {what} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerMissing(f"{what} could not be installed: {error}") from None
    if done.returncode:
        said = re.search(r"ERROR: (.*)", done.stderr) or re.search(r"(.+)\s*$", done.stderr)
        raise PeerMissing(f"{what} could not be installed: {said.group(1) if said else 'pip said nothing'}")
