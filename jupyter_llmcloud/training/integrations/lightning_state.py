"""What a Lightning Trainer keeps of a `fit()` that is under way, for checkpoints of the cell.

Its loops are `while` loops over counters that they keep in objects, and draw batches through a fetcher of their own.
So when a cell is executed again, `fit()` begins as ever, up to its first batch; there the loader is led to the saved
position, as that of any loop, and the counters are put back with everything else. Lightning's own checkpoints cannot do
that: within an epoch they neither know the order of samples nor the random numbers.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from jupyter_llmcloud.training.resume.checkpointer import Checkpointer
from jupyter_llmcloud.training.resume.user_code import is_own_module

_METRICS = ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics")
_MEANS = ("value", "cumulated_batch_size", "_forward_cache", "_update_count")
_SET_BY_LIGHTNING = ("log", "log_dict")
_STASH, _STATE = "_llmcloud_means", "_llmcloud_state"


class StandIn:
    """What checkpoints ask of an Accelerator beside its objects (`settings_of`): here nothing of it changes."""

    gradient_accumulation_steps = 1

    def __init__(self) -> None:
        self.step = 0
        self.gradient_state = types.SimpleNamespace(sync_gradients=True, _set_sync_gradients=lambda _: None)
        self.project_configuration = types.SimpleNamespace(
            iteration=0, automatic_checkpoint_naming=False, project_dir=None
        )


class FitState(StandIn):
    """Looks to checkpoints like an Accelerator: its models, optimizers, schedulers, and what else has a state."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self._trainer: weakref.ref[Any] = weakref.ref(trainer)
        self._custom_objects = [LoopState(trainer)]

    @property
    def _models(self) -> list[Any]:
        model = getattr(self._trainer(), "model", None)  # in its wrapper, once there is one
        return [model] if model is not None else []

    @property
    def _optimizers(self) -> list[Any]:
        return list(getattr(self._trainer(), "optimizers", ()))

    @property
    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in getattr(self._trainer(), "lr_scheduler_configs", ())]

    @property
    def scaler(self) -> Any:
        """Of mixed precision in float16."""
        return getattr(getattr(self._trainer(), "precision_plugin", None), "scaler", None)


class FabricState(StandIn):
    """Looks to checkpoints like an Accelerator: the loaders that a Fabric has set up, which count their passes."""

    scaler = None

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell
        self._models = self._optimizers = self._schedulers = ()
        self._loaders: list[Any] = []
        self._custom_objects = [self]

    def note(self, loaders: Any) -> None:
        """It has set up one loader, or a list of them."""
        self._loaders += loaders if isinstance(loaders, list) else [loaders]

    def state_dict(self) -> dict[str, Any]:
        """How many passes each has begun: the order of the next one depends on it."""
        return {"passes": [getattr(loader, "_num_iter_calls", 0) for loader in self._loaders]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        for loader, number in zip(self._loaders, state["passes"], strict=True):
            loader._num_iter_calls = number


class LoopState:
    """The counters of a Trainer's loops, its callbacks, and the metrics of the epoch."""

    def __init__(self, trainer: Any) -> None:
        self._trainer: weakref.ref[Any] = weakref.ref(trainer)

    def state_dict(self) -> dict[str, Any]:
        """In plain values. Raises RuntimeError where the position between two batches is not known."""
        trainer: Any = self._trainer()
        loop, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
        if getattr(fetcher, "batches", ()) or len(fetcher.combined_loader.flattened) > 1:
            raise RuntimeError(
                "Lightning draws from several loaders at once, or ahead from one without a length; after a restart the "
                "cell runs from its start"
            )
        connector = trainer._logger_connector
        return {
            "loops": loop.state_dict(),
            "fetched": fetcher.fetched,
            "index": fetcher.iterator._iterator._idx,
            "callbacks": [callback.state_dict() for callback in trainer.callbacks],
            "own": [_own_attributes(callback) for callback in trainer.callbacks],
            "metrics": {name: dict(getattr(connector, name)) for name in _METRICS},
            "means": {key: _plain(metric) for key, metric in loop.epoch_loop._results.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The Trainer is before its first batch: it goes on as if it were before the saved one."""
        trainer: Any = self._trainer()
        loop, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
        loop.load_state_dict(state["loops"])
        _go_on(loop)
        fetcher.fetched, fetcher.iterator._iterator._idx = state["fetched"], state["index"]
        for callback, own in zip(trainer.callbacks, state["callbacks"], strict=True):
            if own:
                callback.load_state_dict(own)
        for callback, attributes in zip(trainer.callbacks, state["own"], strict=True):
            vars(callback).update(attributes)
        for name, values in state["metrics"].items():
            setattr(trainer._logger_connector, name, dict(values))
        vars(loop.epoch_loop._results)[_STASH] = dict(state["means"])


def _own_attributes(callback: Any) -> dict[str, Any]:
    """Those of a callback whose class is the user's: it counts on them whether it has a state_dict or not."""
    if not is_own_module(type(callback).__module__):
        return {}
    return {name: value for name, value in vars(callback).items() if name not in _SET_BY_LIGHTNING}


def _plain(metric: Any) -> dict[str, Any]:
    values = {name: getattr(metric, name) for name in _MEANS if hasattr(metric, name)}
    # A metric of torchmetrics that was logged itself belongs to the user's module, and is saved with what the cell has.
    return {name: value for name, value in values.items() if not isinstance(value, torch.nn.Module)}


def _go_on(loop: Any) -> None:
    """These loops have begun already: they are not to look for where a checkpoint of Lightning's was made."""
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    for inner in vars(loop).values():
        if hasattr(inner, "_restarting") and hasattr(inner, "_loaded_from_state_dict"):
            _go_on(inner)


def restore_mean(results: Any, key: str) -> None:
    """A metric is logged for the first time since the cell is back: it goes on with the mean of its epoch."""
    values = vars(results).get(_STASH, {}).pop(key, None)
    if values is not None:
        for name, value in values.items():
            setattr(results[key], name, value)


def note_loaders(fabric: Any, loaders: Any, checkpoints: Checkpointer) -> None:
    """A Fabric has set up loaders: their counts are part of the checkpoints of the cell."""
    if not checkpoints.follows:
        return
    state = vars(fabric).get(_STATE)
    if state is None or state.cell is not checkpoints.cell:
        state = vars(fabric)[_STATE] = FabricState(checkpoints.cell)  # checkpoints know it as long as it lives
        checkpoints.note_accelerator(state)
    state.note(loaders)


def end_passes(loop: Any) -> None:
    """An evaluation has ended: it counts its batches, so that its passes would look as if they were under way."""
    iterator = getattr(getattr(loop, "_combined_loader", None), "_iterator", None)
    if iterator is not None:
        iterator.reset()


@contextmanager
def followed(trainer: Any, checkpoints: Checkpointer) -> Iterator[None]:
    """In the block its `fit()` is part of the checkpoints of the cell."""
    if not checkpoints.follows:
        yield
        return
    state = FitState(trainer)  # checkpoints know it as long as it lives
    checkpoints.note_accelerator(state)
    yield
    del state
