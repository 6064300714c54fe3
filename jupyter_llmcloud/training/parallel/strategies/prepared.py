"""What became of the parameters of models that were spread: optimizers that hold the old ones get the new ones."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.unwrap import unwrapped


class PreparedModels:
    """The models that were spread in this process, and their former parameters."""

    def __init__(self) -> None:
        self._models: list[weakref.ref[torch.nn.Module]] = []  # in the order in which every rank has spread them
        self._successors = _ByIdentity()

    def add(self, model: torch.nn.Module, before: dict[str, torch.nn.Parameter]) -> None:
        """A model was spread; `before`: those of the plain one by name. A name that is gone is on another rank now.

        Raises RuntimeError when all are gone: its optimizer would train nothing.
        """
        self._models = [ref for ref in self._models if ref() is not None]
        self._models.append(weakref.ref(model))
        now = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        plain = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in now.items()}
        if before and not before.keys() & plain.keys():
            raise RuntimeError(
                f"no parameter of {type(model).__name__} has its name any more: {', '.join(plain)[:200]}"
            )
        for name, old in before.items():
            new = plain.get(name)
            if new is not old:
                self._successors[old] = new

    @property
    def models(self) -> list[torch.nn.Module]:
        """Those that are alive, in order."""
        return [model for ref in self._models if (model := ref()) is not None]

    def __contains__(self, model: Any) -> bool:
        return any(known is model for known in self.models)

    def remap(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer train the parameters of now; its state, which it has of earlier steps, is refused."""
        for group in optimizer.param_groups:
            kept, seen = [], set()
            for parameter in group["params"]:
                new = self._successors.get(parameter, parameter)
                if new is None:
                    optimizer.state.pop(parameter, None)
                    continue
                if new is not parameter and (state := optimizer.state.pop(parameter, None)):
                    optimizer.state[new] = _as_begun(state, parameter, new)
                if id(new) not in seen:
                    seen.add(id(new))
                    kept.append(new)
            group["params"] = kept

    def trains(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer trains anything of these models, or what the cell has spread itself."""
        own = {id(parameter) for model in self.models for parameter in model.parameters()}
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return not trained or any(id(one) in own or isinstance(one, DTensor) for one in trained)

    def is_stale(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer trains parameters that no model has any more."""
        return any(parameter in self._successors for group in optimizer.param_groups for parameter in group["params"])


def _as_begun(state: dict[str, Any], old: torch.Tensor, new: torch.Tensor) -> dict[str, Any]:
    """What an optimizer knows of a parameter before its first step, for another one; Adagrad fills it in at once."""
    found = dict(state)
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == old.shape and value.ndim:
            is_filled = value.numel() > 0 and bool((value == value.flatten()[0]).all())
            found[name] = torch.full_like(new, value.flatten()[0].item()) if is_filled else None
    if "step" not in state or float(state["step"]) or any(value is None for value in found.values()):
        raise UsageError(
            "the optimizer has made steps before its model was spread over the ranks, and what it knows of "
            "each parameter does not fit any more. Make a new one, or prepare the model first."
        )
    return found


class _ByIdentity:
    """Values by tensor, as long as the tensor lives: tensors compare by their elements."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[weakref.ref[torch.Tensor], Any]] = {}

    def __setitem__(self, key: torch.Tensor, value: Any) -> None:
        number = id(key)
        self._rows[number] = (weakref.ref(key, lambda _: self._rows.pop(number, None)), value)

    def __contains__(self, key: torch.Tensor) -> bool:
        row = self._rows.get(id(key))
        return row is not None and row[0]() is key

    def get(self, key: torch.Tensor, default: Any = None) -> Any:
        return self._rows[id(key)][1] if key in self else default


PREPARED = PreparedModels()
