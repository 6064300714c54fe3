"""Lightning and Fabric on the ranks of a world: one model over all of them, and its metrics in the run.

Under torchrun their user says how many devices and hosts there are; the default on a CPU is one device, so that each
process trains a model of its own. A world knows how many it has: that is what `Trainer()` and `Fabric()` take, whatever
number is pasted with them, as `notebook_launcher` does.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jupyter_llmcloud.system.import_hooks import when_imported
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.integrations import lightning_state
from jupyter_llmcloud.training.run import Run

_LAUNCHED = ("_spawn", "_fork", "_notebook")  # endings of "ddp" for strategies that would start processes of their own


def adopt(run: Run) -> None:
    """Look after them as soon as a cell imports them. Called once, in a rank."""
    replacements: dict[str, Callable[[Any], Any]] = {
        "_EvaluationLoop.run": lambda original: _evaluation(original, run),
        "_FitLoop.run": lambda original: _fit(original, run),
        "__init__": lambda original: _connector(original, run),
        "log_metrics": lambda original: _log_metrics(original, run),
        "update_train_step_metrics": lambda original: _update_train_step_metrics(original, run),
        "log_dict": lambda original: _log_dict(original, run),
        "update_metrics": _update_metrics,
        "setup_dataloaders": lambda original: _setup_dataloaders(original, run),
    }
    for patch in patches.LIGHTNING:
        when_imported(patch.module, lambda patch=patch: patch.apply(_by_name(patch, replacements)))  # type: ignore[misc]


def _by_name(patch: patches.Patch, replacements: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    names = {target: target.rpartition(":")[2] for target in patch.targets}
    return {target: replacements.get(name) or replacements[name.rpartition(".")[2]] for target, name in names.items()}


# --- the ranks are the devices ---------------------------------------------------------------------------------------


def _connector(original: Callable[..., None], run: Run) -> Callable[..., None]:
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        if run.is_on_all_ranks and run.world_size > 1:
            given.arguments |= _on_ranks(given.arguments, run)
        original(*given.args, **given.kwargs)

    return __init__


def _on_ranks(given: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The arguments that make one model over all ranks of what a notebook or a script asks for."""
    num_devices, num_nodes = _layout(run.world_size)
    wanted = _number_of(given["devices"])
    if wanted not in (None, num_devices, run.world_size) and run.rank == 0:
        print(
            f"devices={given['devices']!r}: a cell runs on the ranks of its world, and there are {run.world_size}; one "
            f"model is trained on all of them. For another number: %world resize {wanted}",
            file=sys.stderr,
        )
    # A list of GPUs says which of them, and is right or refused by Lightning.
    devices = given["devices"] if isinstance(given["devices"], Sequence) and wanted == num_devices else num_devices
    return {"devices": devices, "num_nodes": num_nodes, "strategy": _without_launcher(given["strategy"])}


def _layout(world_size: int) -> tuple[int, int]:
    """(devices of a host, hosts), as Lightning counts them: every host has as many."""
    local, groups = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
    return (local, groups) if local * groups == world_size else (world_size, 1)


def _number_of(devices: Any) -> int | None:
    """How many devices are asked for; None where it is left to Lightning."""
    if isinstance(devices, str):
        names = [name for name in devices.split(",") if name.strip()]
        devices = int(devices) if devices.strip().lstrip("-").isdigit() else names if len(names) > 1 else None
    if isinstance(devices, int):
        return devices if devices > 0 else None
    return len(devices) if isinstance(devices, Sequence) else None


def _without_launcher(strategy: Any) -> Any:
    """The same strategy, without processes of its own: `ddp_notebook` forks, and waits for ranks that nobody starts."""
    if isinstance(strategy, str):
        for ending in _LAUNCHED:
            if strategy.lower().startswith(f"ddp{ending}"):
                return "ddp" + strategy.lower().removeprefix(f"ddp{ending}")
    elif getattr(strategy, "_start_method", "popen") != "popen":
        strategy._start_method = "popen"
    return strategy


# --- metrics and progress --------------------------------------------------------------------------------------------


def _log_metrics(original: Callable[..., None], run: Run) -> Callable[..., None]:
    def log_metrics(self: Any, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if metrics:
            at = step if step is not None else metrics.get("step")
            if at is None:
                at = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            run.log({name: value for name, value in metrics.items() if name != "step"}, step=int(at))
        original(self, metrics, step)

    return log_metrics


def _update_train_step_metrics(original: Callable[..., None], run: Run) -> Callable[..., None]:
    def update_train_step_metrics(self: Any) -> None:
        original(self)
        trainer = self.trainer
        if trainer.max_steps > 0:
            run.progress(trainer.global_step, trainer.max_steps)
        elif math.isfinite(total := trainer.num_training_batches * (trainer.max_epochs or 0)) and total > 0:
            run.progress(trainer.fit_loop.epoch_loop.total_batch_idx + 1, total)

    return update_train_step_metrics


def _log_dict(original: Callable[..., None], run: Run) -> Callable[..., None]:
    def log_dict(self: Any, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run.log(metrics, step=step)
        original(self, metrics, step)

    return log_dict


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _fit(original: Callable[..., None], run: Run) -> Callable[..., None]:
    def run_fit(self: Any) -> None:
        with lightning_state.followed(self.trainer, run.checkpoints):
            original(self)

    return run_fit


def _evaluation(original: Callable[..., Any], run: Run) -> Callable[..., Any]:
    def run_evaluation(self: Any) -> Any:
        outcome = original(self)
        if run.checkpoints.follows:
            lightning_state.end_passes(self)
        return outcome

    return run_evaluation


def _setup_dataloaders(original: Callable[..., Any], run: Run) -> Callable[..., Any]:
    def setup_dataloaders(self: Any, *dataloaders: Any, **options: Any) -> Any:
        loaders = original(self, *dataloaders, **options)
        lightning_state.note_loaders(self, loaders, run.checkpoints)
        return loaders

    return setup_dataloaders


def _update_metrics(original: Callable[..., None]) -> Callable[..., None]:
    def update_metrics(self: Any, key: str, value: Any, batch_size: int) -> None:
        lightning_state.restore_mean(self, key)
        original(self, key, value, batch_size)

    return update_metrics
