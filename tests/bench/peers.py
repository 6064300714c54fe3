"""Where the peers live that must not live beside the product.

TensorBoard, W&B and trackio in the product's own environment would change what is measured and tested there: `Trainer`
reports to every tracker it can import. nbdistributed brings classic notebook with it. So the bench makes them an
environment of their own, on top of the one it runs in (torch is not installed twice), the first time one is asked for.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.bench.shell import REPOSITORY

FOLDER = Path(sys.prefix) / "bench-peers"
CONSTRAINTS = REPOSITORY / ".ci" / "constraints.txt"
INSTALL_TIMEOUT_S = 300.0
# nbdistributed ends its workers, at the worst, by `pkill -f`, which also ends workers of others.
_HARMLESS_PKILL = "#!/bin/sh\nexit 0\n"


class PeerMissing(Exception):
    """A peer cannot be had here; the message says why."""


@functools.cache
def python_with(package: str) -> Path:
    """A Python that can import `package`; installs it first where it is missing. Raises PeerMissing."""
    if not (FOLDER / "bin" / "python").exists():
        _make()
    stamp = FOLDER / f"{package}.installed"
    wanted = _pinned(package)
    if not stamp.exists() or stamp.read_text() != wanted:
        _install(package, wanted)
        stamp.write_text(wanted)
    return FOLDER / "bin" / "python"


def _make() -> None:
    _run([sys.executable, "-m", "venv", "--without-pip", str(FOLDER)], "an environment for the peers")
    for below in FOLDER.glob("lib/python*/site-packages"):
        beneath = sysconfig.get_paths()["purelib"]
        (below / "beneath.pth").write_text(f"import site; site.addsitedir({beneath!r})\n")
    pkill = FOLDER / "bin" / "pkill"
    pkill.write_text(_HARMLESS_PKILL)
    pkill.chmod(0o755)


def _pinned(package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==.*$", CONSTRAINTS.read_text(), re.MULTILINE)
    return found.group() if found else package


def _install(package: str, wanted: str) -> None:
    flags = ["--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    _run([str(FOLDER / "bin" / "python"), "-m", "pip", "install", *flags, wanted], wanted)


def _run(command: list[str], what: str) -> None:
    print(f"  installing {what} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerMissing(f"{what} could not be installed: {error}") from None
    if done.returncode:
        said = re.search(r"ERROR: (.*)", done.stderr) or re.search(r"(.+)\s*$", done.stderr)
        raise PeerMissing(f"{what} could not be installed: {said.group(1) if said else 'pip said nothing'}")
