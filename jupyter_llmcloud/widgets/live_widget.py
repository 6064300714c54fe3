"""The widget of a run: its traits are the whole contract with `live_view.js`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

_HERE = Path(__file__).parent


class LiveWidget(anywidget.AnyWidget):
    """Shows a run in a cell.

    Traits:
        run: {"id", "name", "state", "active"}.
        elapsed: seconds since the run began; the front end counts on by itself while the run is active.
        progress: [{"desc", "done", "total", "fraction", "rate", "eta", "waits"}], the outer bar first; "waits"
            stands in place of a time left that nobody knows.
        ranks: [{"label", "state", "detail"}].
        charts: [{"name", "color", "points": [[step, mean, low?, high?], ...], "steps", "values", "log", "outside",
            "marks"}]: mean None in a gap; axes are {"low", "high", "ticks": [[value, text], ...]}, "log" is None where
            there is none; "marks" are [first, last] steps of values that were not finite. See core.metrics.axes.
        latest: {metric: {"step", "value", "text", "note", "ranks", "alarm"}}, sent more often than the charts.
        log_scales: names of the metrics that are shown in powers of ten; the front end sets it.
        notice: what hinders the run now, "" when nothing does.
    Message from the front end: {"type": "stop"}, when the REST route cannot be reached.
    """

    _esm = _HERE / "live_view.js"
    _css = _HERE / "live_view.css"

    run = traitlets.Dict().tag(sync=True)
    elapsed = traitlets.Float(0.0).tag(sync=True)
    progress: Any = traitlets.List().tag(sync=True)
    ranks: Any = traitlets.List().tag(sync=True)
    charts: Any = traitlets.List().tag(sync=True)
    latest = traitlets.Dict().tag(sync=True)
    notice = traitlets.Unicode("").tag(sync=True)
    log_scales: Any = traitlets.List().tag(sync=True)

    def __init__(self, stop: Callable[[], None], **traits: Any) -> None:
        super().__init__(**traits)
        self._stop = stop
        self.on_msg(self._on_message)

    def _on_message(self, _widget: object, content: object, _buffers: object) -> None:
        if isinstance(content, dict) and content.get("type") == "stop":
            self._stop()
