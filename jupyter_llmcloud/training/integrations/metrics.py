"""Metrics with no code: Accelerate, Trainer and tqdm report to the run whatever else they report to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import parse_flag_from_env
from transformers.trainer_callback import TrainerCallback

from jupyter_llmcloud.training import patches

if TYPE_CHECKING:
    from jupyter_llmcloud.training.run import Run

_run: Run | None = None


class RunTracker(GeneralTracker):
    """Accelerate's tracker interface over the run; attached to every Accelerator of a rank."""

    name = "llmcloud"
    requires_logging_directory = False
    main_process_only = False

    @property
    def tracker(self) -> Run | None:
        """The run of the cell, as Accelerate asks for it."""
        return _run

    def start(self) -> None:
        """Nothing to start: the run is there."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing to store: the cell's source holds the configuration."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if _run is not None:
            _run.log(values, step=step)

    def finish(self) -> None:
        """The run ends with the cell."""


class Trackers(list[GeneralTracker]):
    """An Accelerator's. Those that init_trackers() adds come before ours: scripts say `accelerator.trackers[0]`."""

    def __init__(self, trackers: Iterable[GeneralTracker]) -> None:
        super().__init__(trackers)
        self._failed: set[str] = set()

    def append(self, tracker: GeneralTracker) -> None:
        self.insert(len(self) - 1, tracker)

    def note_failure(self, tracker: GeneralTracker, error: Exception) -> None:
        """Name it, once: what only looks at a training must not end it."""
        if tracker.name not in self._failed:
            self._failed.add(tracker.name)
            sys.stderr.write(
                f"the tracker {tracker.name!r} could not log ({type(error).__name__}: {error}). The training goes on, "
                "and so does this run's own chart; further failures of it are not told.\n"
            )


class RunCallback(TrainerCallback):
    """Trainer's logs and steps."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if _run is not None and logs:
            _run.log(logs, step=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _run is not None and state.max_steps > 0:
            _run.progress(state.global_step, state.max_steps)


def attach(run: Run) -> None:
    """Report to `run` from now on in this process. Called once, in a rank."""
    global _run
    _run = run
    _attach_to_accelerator()
    patches.TRAINER_METRICS.apply({"transformers.trainer:DEFAULT_CALLBACKS": lambda known: [*known, RunCallback]})
    patches.PROGRESS.apply({"tqdm.std:tqdm.display": _make_display})


def _attach_to_accelerator() -> None:
    patches.ACCELERATOR.apply({"accelerate:Accelerator.__init__": _make_init, "accelerate:Accelerator.log": _make_log})
    patches.PARTIAL_STATE.apply({"accelerate.state:PartialState.__init__": _make_state_init})


def _make_init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # A cell is written like a script, which starts without state: an Accelerator of an earlier cell would
        # otherwise forbid another precision. The old object shares the new state and stays usable.
        if AcceleratorState._shared_state:
            AcceleratorState._reset_state()
        original(self, *args, **kwargs)
        self.trackers = Trackers([*self.trackers, RunTracker()])
        if _run is not None:
            _run.checkpoints.note_accelerator(self)

    return __init__


def _make_state_init(original: Any) -> Any:
    def __init__(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        # On ranks without a GPU only Accelerator() knows so: PartialState(), and every Accelerator after it, would take
        # each rank for a world of its own.
        original(self, cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), **kwargs)

    return __init__


def _make_log(original: Any) -> Any:
    @functools.wraps(original)
    def log(self: Any, values: dict[str, Any], step: int | None = None, log_kwargs: Any = None) -> None:
        # Accelerate keeps the trackers of the other ranks silent; the run shows where ranks differ.
        for tracker in tuple(self.trackers) if self.is_main_process else (RunTracker(),):
            try:
                tracker.log(values, step=step, **(log_kwargs or {}).get(tracker.name, {}))
            except Exception as error:
                if isinstance(tracker, RunTracker) or not isinstance(self.trackers, Trackers):
                    raise
                self.trackers.note_failure(tracker, error)

    return log


def _make_display(original: Any) -> Any:
    def display(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _run is not None and self.total and getattr(self, "pos", 0) in (0, None):
            _run.progress(self.n, self.total, (self.desc or "").rstrip(": "))
        return original(self, *args, **kwargs)

    return display
