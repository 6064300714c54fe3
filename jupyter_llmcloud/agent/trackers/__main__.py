"""`python -m jupyter_llmcloud.agent.trackers FOLDER NAME FINISH_S`: sends the metrics of a run to one tracker.

It reads the run's journals, so a tracker that is slow, hangs or breaks costs the training nothing. Its standard input
ends when the run has ended or is led by another agent; then it sends what there is and ends. What it prints is a note.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from jupyter_llmcloud.agent.trackers.journal_follower import JournalFollower
from jupyter_llmcloud.agent.trackers.writers import WRITERS, TrackerWriter
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.storage.runs import RunFolder

LOOK_S = 0.5


def main() -> None:
    """Follow the run until it has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder, name = RunFolder(Path(sys.argv[1])), sys.argv[2]
    notes = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a tracker prints goes into the log
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    try:
        _follow(folder, name, ended)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500].rstrip(".")
        with contextlib.suppress(OSError):
            print(f"{said}. The run goes on without it.", file=notes)
        raise


def _wait_for_end(ended: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    ended.set()
    time.sleep(float(sys.argv[3]))  # not longer, whatever hangs
    os._exit(1)


def _follow(folder: RunFolder, name: str, ended: threading.Event) -> None:
    while not folder.exists:
        if ended.wait(LOOK_S):
            return
    follower = JournalFollower(folder, folder.path / "tracking" / f"{name}.json")
    writer: TrackerWriter = WRITERS[name](folder.read(), folder.path, follower.saved)
    follower.save()
    while True:
        was_last = ended.is_set()
        if batch := follower.read():
            writer.log(batch)
            follower.save()
        elif was_last:
            break
        else:
            ended.wait(LOOK_S)
    with contextlib.suppress(NotFound):
        if not (record := folder.read()).is_active:  # else another agent leads it, whose process goes on with it
            writer.finish(record.state)


if __name__ == "__main__":
    main()
