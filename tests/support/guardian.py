"""Ends what tests have left, also when their pytest was killed: python -m tests.support.guardian PID MARK FOLDER.

Agents, clusters and runs are made to outlive whoever has started them, and a pytest that gets SIGKILL cleans nothing
up. This process waits until the pytest PID has gone; after a good end it finds nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support import leaks

LOOK_S = 0.5
ROUNDS = 10  # what is ended may have started something meanwhile


def start(mark: str, folder: Path) -> subprocess.Popen[bytes]:
    """Watch over this process, whose folder and mark these are."""
    command = [sys.executable, "-m", "tests.support.guardian", str(os.getpid()), mark, str(folder)]
    env = {name: value for name, value in os.environ.items() if name != leaks.MARK}
    none = subprocess.DEVNULL
    return subprocess.Popen(
        command, cwd=leaks.REPOSITORY, env=env, stdin=none, stdout=none, stderr=none, start_new_session=True
    )


def clean_up(mark: str, folder: Path) -> None:
    """End the processes whose marks begin so, and remove the folder, and those of workers beside it."""
    for _ in range(ROUNDS):
        if not (left := leaks.marked_processes(mark)):
            break
        leaks.end(left)
    for path in (folder, *folder.parent.glob(f"{folder.name}-*")):
        shutil.rmtree(path, ignore_errors=True)


def _is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def main() -> None:
    """Wait, and clean up."""
    pid, mark, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while not _is_gone(process):
            time.sleep(LOOK_S)
    clean_up(mark, folder)


if __name__ == "__main__":
    main()
