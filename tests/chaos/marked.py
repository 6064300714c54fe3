"""The tests that are marked `soak`: what the suite shows in small, in large numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> bool:
    """Print what pytest says in the end; returns whether all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "soak"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = done.stdout.rstrip().splitlines()
    print("\n".join(lines if done.returncode else lines[-1:]), flush=True)
    return done.returncode == 0
