"""Ranks that save a model together agree on what it is before anything is gathered or written."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.plans import layout_of
from jupyter_llmcloud.training.parallel.strategies.alike import different
from jupyter_llmcloud.training.parallel.unwrap import unwrapped
from jupyter_llmcloud.training.parallel.whole import Whole

_STAGES = "torch.distributed.pipelining.stage"
_BY_HAND = (
    "What is split by hand is not gathered: bring the parts together in the cell and save that on one rank "
    "(%%distribute --ranks 0), or have each rank save its own part in run.folder."
)


@dataclass
class SavedModel:
    """What a rank is about to save under a name.

    Attributes:
        problem: why it cannot; "" when it can.
        kind: the class of the object.
        shapes: of a model's tensors by name, None where only the gathered tensor has one.
        sums: two numbers of each parameter, when the ranks are not known to hold the same.
    """

    problem: str = ""
    kind: str = ""
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)


def describe(name: str, value: Any, compares_values: bool) -> SavedModel:
    """What this rank holds under a name."""
    kind = type(unwrapped(value)).__name__
    if not isinstance(value, torch.nn.Module):
        return SavedModel(kind=kind)
    if stage := _stage_of(value):
        return SavedModel(f"--save {name}: this {kind} is {stage}, not the whole model. {_BY_HAND}", kind)
    layout = layout_of(value)
    sums = _sums(value) if compares_values and type(layout) is Whole else {}
    return SavedModel("", f"{kind} ({type(layout).__name__})", layout.shapes(value), sums)


def agree(described: dict[int, dict[str, SavedModel]]) -> None:
    """Raise the same UsageError on every rank unless all can save, and hold the same models."""
    for of_rank in described.values():
        for description in of_rank.values():
            if description.problem:
                raise UsageError(description.problem)
    first, *others = described
    for name, wanted in described[first].items():
        for other in others:
            _agree_on(name, first, wanted, other, described[other][name])


def _agree_on(name: str, first: int, wanted: SavedModel, other: int, found: SavedModel) -> None:
    if wanted.kind != found.kind:
        raise UsageError(
            f"--save {name}: it is a {wanted.kind} on rank {first} and a {found.kind} on rank {other}. {_BY_HAND}"
        )
    if difference := different(wanted.shapes, found.shapes, f"rank {first}", f"rank {other}"):
        raise UsageError(f"--save {name}: the ranks hold different parts or models: {difference}. {_BY_HAND}")


def unlike_values(described: dict[int, dict[str, SavedModel]]) -> dict[str, str]:
    """The models of which ranks hold different values although nothing has spread them, with their first tensor."""
    first, *others = described.values()
    found = {}
    for name, wanted in first.items():
        for parameter, sums in wanted.sums.items():
            if not all(_are_close(sums, other[name].sums[parameter]) for other in others):
                found[name] = parameter
                break
    return found


def _are_close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    scale = max(abs(one[1]), abs(other[1]))
    pairs = zip(one, other, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6 * scale) or str(a) == str(b) for a, b in pairs)


def _sums(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    # Of one model on processors of different kinds they differ in the last digits.
    def sums(tensor: torch.Tensor) -> tuple[float, float]:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return float(real.sum(dtype=torch.float64)), float(real.abs().sum(dtype=torch.float64))

    with torch.no_grad():
        return {name: sums(parameter) for name, parameter in model.named_parameters() if not parameter.is_meta}


def _stage_of(model: torch.nn.Module) -> str:
    """Which stage of a pipeline trains a part of this model on this rank; "" when none does."""
    if (stages := sys.modules.get(_STAGES)) is None:
        return ""
    own = {id(parameter) for parameter in model.parameters()}
    for value in gc.get_objects():
        is_stage = issubclass(type(value), stages._PipelineStageBase) and value.num_stages > 1
        if is_stage and any(id(parameter) in own for parameter in value.submod.parameters()):
            return f"stage {value.stage_index} of {value.num_stages} of a pipeline"
    return ""


@contextmanager
def group_of(ranks: list[int]) -> Iterator[Any]:
    """A group of these ranks, all of which must ask for it; None when there is one rank only."""
    if len(ranks) == 1:
        yield None
    elif len(ranks) == dist.get_world_size():
        yield dist.group.WORLD
    else:
        group = dist.new_group(ranks, use_local_synchronization=True)
        try:
            yield group
        finally:
            dist.destroy_process_group(group)


def gathered(value: Any, ranks: list[int], group: Any) -> dict[int, Any]:
    """The values of all ranks of a group."""
    if group is None:
        return {ranks[0]: value}
    values: list[Any] = [None] * len(ranks)
    dist.all_gather_object(values, value, group)
    return dict(zip(ranks, values, strict=True))
