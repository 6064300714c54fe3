"""The leading agent's side of `--track` and of a root at a URL: a process for each, and what it says in the run."""

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
COPY_AFTER_S = 1.0
COPY_FINISH_S = 1800.0  # for the last checkpoint and the model


class TrackerProcesses:
    """Those of one run. They live as long as their standard input is open, and until they have sent what there is.

    Args:
        folder: of the run.
        note: tells of the run, also after its end: a short one has ended before a tracker knows that it cannot.
        url: of the root, where a copy of the run is kept; "" for none.

    Attributes:
        tasks: each done when its process has ended.
    """

    def __init__(self, folder: Path, names: Sequence[str], note: Callable[[str], None], url: str = "") -> None:
        self._folder = folder
        self._note = note
        self._end = asyncio.Event()
        self._inputs: list[asyncio.StreamWriter] = []
        self.tasks = [
            asyncio.ensure_future(self._run(f"--track {name}", name, "", name, FINISH_S))
            for name in names
            if self._is_installed(name)
        ]
        if url:
            copy = f"{url}/runs/{folder.name}"
            self.tasks.append(asyncio.ensure_future(self._keep_copy(copy)))

    def _is_installed(self, name: str) -> bool:
        if importlib.util.find_spec(TRACKERS[name]) is not None:
            return True
        self._note(
            f"--track {name}: the package {TRACKERS[name]} is not installed where the run is executed: pip install"
            f" {TRACKERS[name]}. The run goes on without it."
        )
        return False

    async def _keep_copy(self, url: str) -> None:
        with contextlib.suppress(TimeoutError):  # a short run is copied once, at its end
            await asyncio.wait_for(self._end.wait(), COPY_AFTER_S)
        await self._run(url, "root_copy", ".root_copy", url, COPY_FINISH_S)

    async def _run(self, label: str, name: str, module: str, target: str, finish_s: float) -> None:
        command = [sys.executable, "-m", f"jupyter_llmcloud.agent.trackers{module}", str(self._folder), target]
        try:
            place = self._folder / "tracking"
            place.mkdir(exist_ok=True)
            with open_log(place / f"{name}.log") as log:
                process = await asyncio.create_subprocess_exec(
                    *command, str(finish_s), stdin=PIPE, stdout=PIPE, stderr=log, start_new_session=True
                )
        except OSError as error:
            self._note(f"{label}: {error}. The run goes on without it.")
            return
        assert process.stdin is not None and process.stdout is not None
        self._inputs.append(process.stdin)
        if self._end.is_set():
            process.stdin.close()
        has_said = False
        async for line in process.stdout:
            has_said = True
            self._note(f"{label}: {line.decode(errors='replace').strip()}")
        if await process.wait() and not has_said:
            self._note(f"{label}: it has not taken all that was logged: see tracking/{name}.log in the run's folder.")

    def close(self) -> None:
        """The run has ended, or is led elsewhere: they send what there is, and end."""
        self._end.set()
        for stdin in self._inputs:
            with contextlib.suppress(OSError):
                stdin.close()
