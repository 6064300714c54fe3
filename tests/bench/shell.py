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

REPOSITORY = Path(__file__).resolve().parent.parent.parent


_STOP = """\
try:
    get_ipython().run_line_magic("cluster", "stop")
except Exception as error:
    print(error)  # there may be none
"""


class CellFailed(Exception):
    """A cell of a contender raised."""


class Shell:
    """A shell in a process of its own; `with` ends it.

    Attributes:
        pid: of the process.
        started: seconds since the epoch when its process was asked for.
    """

    def __init__(self, env: dict[str, str]) -> None:
        self.started = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.shell"],
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
        error = shell.run_cell(cell, store_history=True).error_in_exec
        seconds.append(time.perf_counter() - start)
        if error is not None:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None, "began": began, "seconds": seconds}


@contextlib.contextmanager
def product(folder: Path) -> Iterator[Shell]:
    """A shell for our magics, with a root of its own; its cluster and server go with it."""
    env = {
        "LLMCLOUD_ROOT": str(folder / "root"),
        "LLMCLOUD_RUNTIME_DIR": str(folder / "run"),
        "LLMCLOUD_LEASE_S": "5",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    (folder / "ipython").mkdir(parents=True)
    with Shell(env) as shell:
        try:
            yield shell
        finally:
            shell.run(_STOP)


if __name__ == "__main__":
    _serve()
