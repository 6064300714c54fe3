"""A run whose ranks are not there yet: its record and its card are, from the moment on that its cell is executed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time

import psutil

from jupyter_llmcloud import config
from jupyter_llmcloud.core.spec import RunSpec
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord
from jupyter_llmcloud.widgets.front_end import find_front_end
from jupyter_llmcloud.widgets.live_view import LiveView

FINDING, STARTING = "finding a cluster", "starting ranks"


class RunStart:
    """Of one cell; says nothing unless a phase begins, which none does where the ranks are there.

    Args:
        asked: when the cell was executed, in seconds since the epoch.

    Attributes:
        live: its view in the cell, once there is one.
    """

    def __init__(self, folder: RunFolder, name: str, source: str, spec: RunSpec, owner: str, asked: float) -> None:
        self.live: LiveView | None = None
        self._folder = folder
        self._source = source
        self._is_seen = not spec.background  # a handle is what the cell of a background run shows
        self._record = RunRecord(folder.run_id, name, created=asked, owner=owner)
        self._spec = spec

    def phase(self, name: str) -> None:
        """This begins now."""
        record = self._record
        if is_first := not record.history:  # a cell that finds its ranks comes here never, and does without
            record.spec = self._spec.as_dict()
            started = psutil.Process().create_time()
            record.starter = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        at = record.created if is_first else time.time()
        record.history.append({"t": round(at, 3), "phase": name, **({"state": record.state} if is_first else {})})
        with contextlib.suppress(OSError):  # what cannot be written is said when the run begins
            if is_first:
                self._folder.create(record, self._source)
            else:
                self._folder.write(record)
        front_end = find_front_end()
        if self._is_seen and front_end.takes_widgets:
            if self.live is None:
                started = record.created
                self.live = LiveView(record.run_id, record.name, (), lambda: None, started=started, front_end=front_end)
            self.live.place(name)

    def take_back(self) -> None:
        """The run will not begin: where no agent has made a record of its own, there was none."""
        if not self._record.history:
            return
        if self._is_still_ours():
            shutil.rmtree(self._folder.path, ignore_errors=True)
        if self.live is not None:
            self.live.withdraw()

    def check_kept(self) -> None:
        """The run has ended: say so when the host of its ranks has kept it elsewhere, in a folder that is called so."""
        if self._record.history and self._is_still_ours():
            shutil.rmtree(self._folder.path, ignore_errors=True)  # it would wait for its ranks for ever
            print(
                f"Nothing of this run has come to {self._folder.root}: the hosts of its ranks have a folder of their "
                f"own there. %runs, %serve, --resume and panels find none of this world. Set {config.ENV_ROOT} to a "
                "folder that all hosts share, or to a URL, here and for the Dask workers.",
                file=sys.stderr,
            )

    def _is_still_ours(self) -> bool:
        """Whether no agent has made a record of its own."""
        try:
            return self._folder.read().starter == self._record.starter
        except (NotFound, OSError):
            return False
