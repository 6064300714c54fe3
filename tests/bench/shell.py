"""An IPython shell in a fresh process that executes cells and tells how long each took.

`Shell` is the parent's side; `python -m tests.bench.shell` is the process. They speak JSON lines over a pipe of
their own, so that what cells print does not get in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LEAVE_S = 5.0  # what a peer has started gets so long to end by itself

# Ends the cluster of a notebook, if there is one.
STOP = """\
try:
    get_ipython().run_line_magic("cluster", "stop")
except Exception as error:
    print(error)  # there may be none
"""


class CellFailed(Exception):
    """A cell of a contender raised."""


class Shell:
    """A shell in a process of its own; `with` ends it.

    Args:
        env: besides this process's own; BENCH_FAMILY is what all processes of this contender are known by.
        python: which interpreter; the bench's own when None.

    Attributes:
        pid: of the process.
    """

    def __init__(self, env: dict[str, str], python: Path | None = None) -> None:
        self._process = subprocess.Popen(
            [python or sys.executable, "-m", "tests.bench.shell", env.get("BENCH_FAMILY", "")],
            cwd=REPOSITORY,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def begin(self, cell: str, times: int = 1) -> None:
        """Execute a cell some times, without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"cell": cell, "times": times}) + "\n")
        self._process.stdin.flush()

    def finish(self) -> tuple[float, list[float]]:
        """Wait for the cell of `begin`: (seconds since the epoch when it began, seconds of each time)."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CellFailed(f"the shell has ended with status {self._process.wait()}")
        answer = json.loads(line)
        if answer["error"]:
            raise CellFailed(answer["error"])
        return answer["began"], answer["seconds"]

    def run(self, cell: str, times: int = 1) -> list[float]:
        """Execute a cell some times; the seconds of each."""
        self.begin(cell, times)
        return self.finish()[1]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for request in map(json.loads, sys.stdin):
            print(json.dumps(_execute(shell, **request)), file=answers, flush=True)


def _execute(shell: Any, cell: str, times: int) -> dict[str, Any]:
    seconds = []
    began = time.time()
    for _ in range(times):
        start = time.perf_counter()
        done = shell.run_cell(cell, store_history=True)
        seconds.append(time.perf_counter() - start)
        error = done.error_before_exec or done.error_in_exec
        if error is not None:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None, "began": began, "seconds": seconds}


@contextlib.contextmanager
def peer_shell(folder: Path, python: Path | None = None, env: dict[str, str] | None = None) -> Iterator[Shell]:
    """A shell for a peer, with an IPython folder of its own; what it has started and left running is ended."""
    (folder / "ipython").mkdir(parents=True, exist_ok=True)
    started: list[psutil.Process] = []
    try:
        with Shell(
            {"IPYTHONDIR": str(folder / "ipython"), "BENCH_FAMILY": str(folder), **(env or {})}, python
        ) as shell:
            try:
                yield shell
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    started = psutil.Process(shell.pid).children(recursive=True)
    finally:
        for process in psutil.wait_procs(started, timeout=LEAVE_S)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def product(folder: Path) -> Iterator[Shell]:
    """A shell for our magics, with a root of its own; its cluster and server go with it."""
    with Shell(product_env(folder)) as shell:
        try:
            yield shell
        finally:
            shell.run(STOP)


def product_env(folder: Path) -> dict[str, str]:
    """What keeps everything of ours below `folder`, and lets nothing live longer than the shell."""
    (folder / "ipython").mkdir(parents=True)
    return {
        "LLMCLOUD_ROOT": str(folder / "root"),
        "LLMCLOUD_RUNTIME_DIR": str(folder / "run"),
        "LLMCLOUD_LEASE_S": "5",
        "IPYTHONDIR": str(folder / "ipython"),
        "BENCH_FAMILY": str(folder),
    }


if __name__ == "__main__":
    _serve()
