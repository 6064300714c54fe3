"""The state that a trial of a population leaves, and what the next one makes of it: `trial.save`, `trial.restore`.

What was learned goes on (weights, an optimizer's moments, how far a schedule is, random numbers); what is searched does
not: rates and other settings of an optimizer stay as the cell has made them from its own values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.checkpoint import rng, serialization, stateful_objects, writer
from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.checkpoint.serialization import NotPlain, decode, encode
from jupyter_llmcloud.training.parallel.fully_sharded import settle
from jupyter_llmcloud.training.parallel.strategies.active import ACTIVE

SHARED = "shared.pt"


def _copy(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


# --- leaving ---


def save(folder: Path, rank: int, world_size: int, objects: Mapping[str, Any]) -> None:
    """Write the state of objects, and of this rank. Raises UsageError for what cannot be kept."""
    loaders = {name: value for name, value in objects.items() if isinstance(value, DataLoader)}
    stateful = {name: value for name, value in objects.items() if name not in loaders and _has_state(value)}
    for value in stateful.values():
        settle(value)
    found = stateful_objects.named(stateful, world_size == 1)
    try:
        own = {
            "world_size": world_size,
            "rng": rng.loadable(rng.snapshot()),
            "plan": ACTIVE.state(_copy, stateful_objects.modules(stateful)),
            "objects": stateful_objects.take(found, False, _copy, _copy),
            "loaders": {name: _loader_state(value) for name, value in loaders.items()},
            "values": {
                name: encode(value, _copy, name) for name, value in objects.items() if name not in (*stateful, *loaders)
            },
        }
        shared = stateful_objects.take(found, True, _copy, _copy) if rank == 0 else {}
    except NotPlain as error:
        raise UsageError(f"trial.save cannot keep this: {error}.") from None
    if bad := stateful_objects.not_finite({**shared, **own["objects"]}):
        raise UsageError(f"trial.save: {bad}; nobody could go on from there.")
    if rank == 0:
        _write(shared, folder / SHARED)
    _write(own, folder / _rank_file(rank))


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _loader_state(loader: Any) -> dict[str, Any]:
    return {
        "generators": [generator.get_state() for generator in rng.generators_of(loader)],
        "iteration": getattr(loader, "iteration", None),
    }


def _write(value: Any, path: Path) -> None:
    staging = path.with_suffix(".tmp")
    serialization.save(value, staging)
    os.replace(staging, path)


# --- going on ---


def restore(folder: Path, rank: int, world_size: int, parent: int, objects: Mapping[str, Any]) -> dict[str, Any]:
    """Put the state of trial `parent` into objects; returns the plain values that it has kept. Raises UsageError."""
    path = folder / _rank_file(rank)
    if not path.exists():
        raise UsageError(
            f"trial {parent} has left no state of rank {rank} in {folder}: every rank must call trial.save, on as many "
            "ranks as now, in a folder that all hosts see."
        )
    own = writer.read(path)
    if own["world_size"] != world_size:
        raise UsageError(f"trial {parent} ran on {own['world_size']} ranks, and this one has {world_size}.")
    states = {**writer.read(folder / SHARED), **own["objects"]}
    _check_names({*states, *own["loaders"]}, objects, parent)
    for value in objects.values():
        settle(value)
    made = {name: _settings(value) for name, value in objects.items()}
    try:
        stateful_objects.put(states, dict(objects))
    except (RuntimeError, ValueError, ResumeMissed) as error:
        words = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"the state of trial {parent} does not fit: {words}. Values on which the shape of the model depends stay "
            "with its state by trial.keep('width', ...)."
        ) from None
    plan = own.get("plan")
    ACTIVE.put(plan, ACTIVE.how_to_load(plan, same_world=True), stateful_objects.modules(objects))
    for name, state in own["loaders"].items():
        _put_loader(objects[name], state)
    _keep_settings(objects, made)
    rng.restore(own["rng"])
    return {name: decode(value) for name, value in own["values"].items()}


def _check_names(saved: set[str], objects: Mapping[str, Any], parent: int) -> None:
    known = ", ".join(sorted(saved)) or "no objects"
    if missing := sorted(saved - objects.keys()):
        call = ", ".join(f"{name}={name}" for name in sorted(saved))
        raise UsageError(
            f"trial {parent} has saved {known}, and {missing[0]!r} is not put back: call trial.restore({call})."
        )
    if unknown := sorted(objects.keys() - saved):
        raise UsageError(f"trial {parent} has saved no {unknown[0]!r} ({known}): hand it to trial.save, too.")


def _put_loader(loader: Any, state: dict[str, Any]) -> None:
    generators = rng.generators_of(loader)
    if len(generators) != len(state["generators"]):
        raise UsageError(f"the loader had {len(state['generators'])} generators, and now has {len(generators)}.")
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)
    if state["iteration"] is not None:
        loader.iteration = state["iteration"]


# --- what is searched stays as the cell has made it ---


def _settings(value: Any) -> list[dict[str, Any]]:
    """Of each group of an optimizer, or of a schedule; empty for anything else."""
    if (optimizer := stateful_objects.inner_optimizer(value)) is not None:
        return [{name: item for name, item in group.items() if name != "params"} for group in optimizer.param_groups]
    schedule = _schedule(value)
    return [{"base_lrs": list(part.base_lrs)} for part in _parts(schedule)] if schedule is not None else []


def _schedule(value: Any) -> Any:
    inner = stateful_objects.layers(value)[-1]
    return inner if isinstance(inner, LRScheduler) and hasattr(inner, "base_lrs") else None


def _parts(schedule: Any) -> list[Any]:
    """A schedule, and those that it is made of."""
    return [schedule, *(part for inner in getattr(schedule, "_schedulers", ()) for part in _parts(inner))]


def _keep_settings(objects: Mapping[str, Any], made: Mapping[str, list[dict[str, Any]]]) -> None:
    schedules = [found for value in objects.values() if (found := _schedule(value)) is not None]
    for name, value in objects.items():
        optimizer = stateful_objects.inner_optimizer(value)
        if optimizer is None:
            continue
        goes_on = any(stateful_objects.inner_optimizer(one.optimizer) is optimizer for one in schedules)
        for group, before in zip(optimizer.param_groups, made[name], strict=True):
            rate = _rate(group, before, goes_on)
            group.update(before)
            group["lr"] = rate
    for name, value in objects.items():
        schedule = _schedule(value)
        if schedule is not None and made[name]:
            for part, before in zip(_parts(schedule), made[name], strict=True):
                part.base_lrs = before["base_lrs"]
                part._last_lr = [group["lr"] for group in part.optimizer.param_groups]


def _rate(saved: Mapping[str, Any], made: Mapping[str, Any], goes_on: bool) -> Any:
    """The rate that a schedule has come to, from the one that this trial begins with; without one, the trial's own."""
    base, own = saved.get("initial_lr"), made.get("initial_lr", made.get("lr"))
    if not goes_on or not base or own is None:
        return made.get("lr")
    return own * (saved["lr"] / base)
