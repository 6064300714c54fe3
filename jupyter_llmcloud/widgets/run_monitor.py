"""The monitor of a run as a widget: for front ends that cannot show its panel from the server."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from jupyter_llmcloud.storage.runs import RunFolder

WATCHED_EVERY_S = 10.0  # how often a front end is told of a run that another page watches
STATIC = Path(__file__).parent / "static"  # built from labextension/src/widgets


class RunMonitor(anywidget.AnyWidget):
    """Shows a run in a cell: from the server of the page where that knows the run, else from these traits.

    Traits:
        info: a `RunInfo` (see protocol.http.events) of what the kernel knows of the run.
        series: its metrics as `SeriesTail`s, whole; sent less often than `info`.
        log_scales: names of the metrics that are shown in powers of ten; the front end sets it.
        watching: the front end follows the run at its server and needs nothing of `info` and `series`; it takes that
            back when it cannot any more.
    Message from the front end: {"type": "stop"}, when the REST route cannot be reached.
    """

    _esm: Any = STATIC / "run-monitor.js"
    _css: Any = STATIC / "panels.css"

    info = traitlets.Dict().tag(sync=True)
    series: Any = traitlets.List().tag(sync=True)
    log_scales: Any = traitlets.List().tag(sync=True)
    watching = traitlets.Bool(False).tag(sync=True)

    def __init__(self, stop: Callable[[], None], folder: RunFolder, **traits: Any) -> None:
        super().__init__(**traits)
        self._stop = stop
        self._folder = folder
        self._sent_at = 0.0
        self.on_msg(self._on_message)

    def is_due(self, now: float) -> bool:
        """Whether the traits are to be sent now: not to a page that follows the run at its server.

        A kernel that executes a cell hears nothing of its pages. So where the server says that a page watches, the
        traits are still sent now and then, for another one that cannot.
        """
        every_s = math.inf if self.watching else WATCHED_EVERY_S if self._folder.is_watched else 0.0
        if now - self._sent_at < every_s:
            return False
        self._sent_at = now
        return True

    def forget_code(self) -> None:
        """Hold no module and no style any more: what stores the states of widgets would store them each time."""
        self._esm = "export default {}"
        self._css = ""

    def _on_message(self, _widget: object, content: object, _buffers: object) -> None:
        if isinstance(content, dict) and content.get("type") == "stop":
            self._stop()
