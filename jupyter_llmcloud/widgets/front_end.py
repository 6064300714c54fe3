"""Where a view is shown: a notebook that takes displays and widgets, or a terminal that takes text."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class FrontEnd(Protocol):
    """Shows mime bundles."""

    takes_widgets: bool

    def show(self, data: Mapping[str, Any], display_id: str, update: bool) -> None:
        """Show a bundle; with `update`, in place of the one shown under the same id."""


class Notebook:
    """The front ends of a Jupyter kernel."""

    takes_widgets = True

    def show(self, data: Mapping[str, Any], display_id: str, update: bool) -> None:
        _publish(data, display_id, update)
        if update and threading.current_thread() is not threading.main_thread() and not is_watched():
            _UPDATES.show_again(data, display_id)


class _Updates:
    """Those that a thread has shown, once more when the next cell begins.

    Who executes a whole notebook takes an update while a cell is executed and drops one that comes between two: a run
    that has ended then would be saved as one that runs.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()

    def show_again(self, data: Mapping[str, Any], display_id: str) -> None:
        """Show this update again; a later one of the same display takes its place."""
        from IPython import get_ipython

        with self._lock:
            if not self._kept:
                get_ipython().events.register("pre_run_cell", self._show)
            self._kept[display_id] = data

    def _show(self, *_: Any) -> None:
        from IPython import get_ipython

        with self._lock:
            kept, self._kept = self._kept, {}
            get_ipython().events.unregister("pre_run_cell", self._show)
        for display_id, data in kept.items():
            _publish(data, display_id, update=True)


_UPDATES = _Updates()


def _publish(data: Mapping[str, Any], display_id: str, update: bool) -> None:
    from IPython.display import publish_display_data

    publish: Callable[..., None] = publish_display_data
    publish(dict(data), transient={"display_id": display_id}, update=update)


class Terminal:
    """IPython in a terminal, or a plain script: text, one after the other."""

    takes_widgets = False

    def show(self, data: Mapping[str, Any], display_id: str, update: bool) -> None:
        print(data["text/plain"], flush=True)


def find_front_end() -> FrontEnd:
    """What this process shows its output in."""
    return Notebook() if _kernel() is not None else Terminal()


def is_watched() -> bool:
    """Whether somebody may see the output of this cell come.

    Who executes a whole notebook (nbclient, and so nbconvert and papermill) says that nobody answers questions, and
    keeps each state of a line that is rewritten as a line of its own.
    """
    kernel = _kernel()
    request = kernel.get_parent("shell") if kernel is not None and hasattr(kernel, "get_parent") else None
    return bool(((request or {}).get("content") or {}).get("allow_stdin", True))


def _kernel() -> Any:
    ipython = sys.modules.get("IPython")  # where it is not imported, no shell of it runs
    return getattr(ipython.get_ipython(), "kernel", None) if ipython is not None else None
