"""`save_state()` and `load_state()` of an Accelerator whose models are cut: the files are those of one process.

Accelerate asks each rank for the state of its optimizer and writes that of the first one. So what it is handed in
their place puts together what is cut when it is asked for its state, and cuts again what it is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from jupyter_llmcloud.training.checkpoint import sharded_tensors
from jupyter_llmcloud.training.parallel.plans import layout_of


class WholeModel:
    """A model that is cut, as `load_state()` loads it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is to be loaded, by name; all ranks must ask."""
        return layout_of(self._model).full_state(self._model)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> tuple[list[str], list[str]]:
        """Returns the names that are missing, and those that are too many. Raises RuntimeError, as a module does."""
        wanted = self.state_dict()
        missing = [name for name in wanted if name not in state]
        unexpected = [name for name in state if name not in wanted]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"the saved {type(self._model).__name__} is another model: missing {missing}, unexpected {unexpected}."
            )
        # Of tensors that are one, the file has one.
        loaded = {id(wanted[name]): value for name, value in state.items() if name in wanted}
        known = {name: state.get(name, loaded.get(id(value), value)) for name, value in wanted.items()}
        layout_of(self._model).put(self._model, known)
        return missing, unexpected


class WholeOptimizer:
    """An optimizer of a model that is cut."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer of the plain model has it; all ranks must ask."""
        found: dict[str, Any] = gathered(self._optimizer.state_dict())
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut it as the parameters are cut."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        cut = sharded_tensors.spread(state, lambda path: parameters[path[1]] if path[0] == "state" else None)
        self._optimizer.load_state_dict(cut)


def gathered(value: Any) -> Any:
    """The same with every tensor that is cut over ranks put together, one after the other."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(gathered(item) for item in value)
    return value


@contextlib.contextmanager
def in_place_of(accelerator: Any, is_cut: Callable[[Any], bool], models: bool) -> Iterator[None]:
    """Within the block an Accelerator has its optimizers, and its `models`, as whole ones."""
    before = accelerator._models, accelerator._optimizers
    accelerator._optimizers = [WholeOptimizer(optimizer) for optimizer in before[1]]
    if models:
        accelerator._models = [WholeModel(model) if is_cut(model) else model for model in before[0]]
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = before
