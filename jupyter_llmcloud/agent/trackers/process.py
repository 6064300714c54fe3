"""The leading agent's side of `--track`: starts a process for each tracker, and notes in the run what it says."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Sequence
from pathlib import Path

from jupyter_llmcloud.core.trackers import TRACKERS
from jupyter_llmcloud.system.spawn import open_log

FINISH_S = 120.0  # for what is left to send when the run has ended; a tracker that takes longer is left alone


class TrackerProcesses:
    """Those of one run. They live as long as their standard input is open, and until they have sent what there is.

    Args:
        folder: of the run.
        note: tells who follows the run.

    Attributes:
        tasks: each done when its process has ended.
    """

    def __init__(self, folder: Path, names: Sequence[str], note: Callable[[str], None]) -> None:
        self._folder = folder
        self._note = note
        self._ended = False
        self._inputs: list[asyncio.StreamWriter] = []
        self.tasks = [asyncio.ensure_future(self._run(name)) for name in names if self._is_installed(name)]

    def _is_installed(self, name: str) -> bool:
        if importlib.util.find_spec(TRACKERS[name]) is not None:
            return True
        self._note(
            f"--track {name}: the package {TRACKERS[name]} is not installed where the run is executed: pip install"
            f" {TRACKERS[name]}. The run goes on without it."
        )
        return False

    async def _run(self, name: str) -> None:
        command = [sys.executable, "-m", "jupyter_llmcloud.agent.trackers", str(self._folder), name, str(FINISH_S)]
        try:
            place = self._folder / "tracking"
            place.mkdir(exist_ok=True)
            with open_log(place / f"{name}.log") as log:
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=PIPE, stdout=PIPE, stderr=log, start_new_session=True
                )
        except OSError as error:
            self._note(f"--track {name}: {error}. The run goes on without it.")
            return
        assert process.stdin is not None and process.stdout is not None
        self._inputs.append(process.stdin)
        if self._ended:
            process.stdin.close()
        async for line in process.stdout:
            if not self._ended:
                self._note(f"--track {name}: {line.decode(errors='replace').strip()}")
        await process.wait()

    def close(self) -> None:
        """The run has ended, or is led elsewhere: they send what there is, and end."""
        self._ended = True
        for stdin in self._inputs:
            with contextlib.suppress(OSError):
                stdin.close()
