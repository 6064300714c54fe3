"""`python -m jupyter_llmcloud.agent.trackers.root_copy FOLDER URL FINISH_S`: keeps a copy of a run at a URL.

A process of its own, so that a storage that is slow, hangs or refuses costs the training nothing. A checkpoint is sent
as soon as it is complete, the rest every few seconds. Its standard input ends when the run has ended or is led by
another agent; then it sends what is left, tries for a while where it cannot, and ends. What it prints is a note.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from jupyter_llmcloud.storage.remote.run_copy import RunCopy
from jupyter_llmcloud.storage.runs import RunFolder
from jupyter_llmcloud.system.atomic_files import write_json

LOOK_S = 0.5
FILES_EVERY_S = 10.0
AGAIN_S = 5.0
TOLD = "copied.json"  # in the run's folder: {"url", "t", "problem"}


class RootCopy:
    """The copy of one run, and what went wrong with it."""

    def __init__(self, folder: RunFolder, url: str) -> None:
        self._folder = folder
        self._url = url
        self._copy: RunCopy | None = None
        self._said: set[str] = set()
        self._files_at = 0.0
        self._tries_at = 0.0

    def send(self, *, is_last: bool) -> bool:
        """Send what there is; whether all went well, and was due."""
        now = time.monotonic()
        if now < self._tries_at:
            return False
        try:
            self._copy = self._copy or RunCopy(self._folder, self._url)
            sent = self._copy.send_checkpoints()
            if sent or is_last or now >= self._files_at:
                self._copy.send_files()
                self._files_at = now + FILES_EVERY_S
                self._tell("")
        except Exception as error:  # of whatever stands between here and there
            self._tries_at = now + AGAIN_S
            self._tell(" ".join(f"{error or type(error).__name__}".split())[:500].rstrip("."))
            return False
        return True

    def _tell(self, problem: str) -> None:
        with contextlib.suppress(OSError):
            told = {"url": self._url, "t": round(time.time(), 3), "problem": problem}
            write_json(self._folder.path / TOLD, told, durable=False)
        if problem and problem not in self._said:
            self._said.add(problem)
            with contextlib.suppress(OSError):
                print(f"it cannot be copied now: {problem}. The run goes on, and it is tried again.", flush=True)


def main() -> None:
    """Copy until the run has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    copy = RootCopy(RunFolder(Path(sys.argv[1])), sys.argv[2])
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    while not ended.wait(LOOK_S):
        copy.send(is_last=False)
    while not copy.send(is_last=True):
        time.sleep(LOOK_S)


def _wait_for_end(ended: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    ended.set()
    time.sleep(float(sys.argv[3]))  # not longer, whatever hangs
    os._exit(1)


if __name__ == "__main__":
    main()
