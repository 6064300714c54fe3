"""The variables of a rank by name, type and size, told from a thread beside the one that computes.

Nothing that a value has written itself is run, and no value of a tensor is read: that would wait for its device.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from typing import Any

import torch

from jupyter_llmcloud.core.serving.models.variable_role import role_of
from jupyter_llmcloud.training.shell.failure_locals import named

MAX_VARIABLES = 500
NUMBERS = ("rank", "local_rank", "world_size")  # of a process, which code of any later cell may count on
RUN = "run"
_NO_VARIABLES = (types.ModuleType,)


def rows(namespace: Mapping[str, Any], initial_names: Collection[str]) -> list[dict[str, Any]]:
    """{"name", "type", "text", "num_bytes", "role"} of what the user has defined, the largest first."""
    own = [
        (name, value)
        for name, value in list(namespace.items())
        if not name.startswith("_") and name not in initial_names and not issubclass(type(value), _NO_VARIABLES)
    ]
    found = [_row(name, value) for name, value in own]
    return sorted(found, key=lambda row: (-(row["num_bytes"] or 0), row["name"]))[:MAX_VARIABLES]


def numbers(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What the names of a rank's numbers, and of its run, are bound to."""
    return {name: namespace[name] for name in (*NUMBERS, RUN) if name in namespace}


def rebound(given: Mapping[str, Any], before: Mapping[str, Any], namespace: Mapping[str, Any]) -> str:
    """What to say where a cell has bound such a name to something else, as `for rank in range(2)` does; "" if none.

    Args:
        given: what they are bound to in a new world.
        before: what they were bound to before the cell.
    """
    told = []
    for name, value in numbers(namespace).items():
        if value is before.get(name):
            continue
        if name == RUN and before.get(name) is given.get(name) and issubclass(type(value), types.FunctionType | type):
            told.append(
                "run is a function of this cell in later cells, too, so that run.log(...) is not there. `del run` "
                "brings it back; `from jupyter_llmcloud import run` gives it another place.\n"
            )
        elif name in NUMBERS and type(value) is int and value != given.get(name):
            told.append(
                f"{name} is {value} in later cells, too: this cell has bound the name, which every process has for a "
                f"number of its own. `del {name}` brings that back.\n"
            )
    return "".join(told)


def _row(name: str, value: Any) -> dict[str, Any]:
    text = _tensor(value) if issubclass(type(value), torch.Tensor) else _plain(name, value)
    about = {"name": name, "type": type(value).__name__, "role": role_of(value)}
    return {**about, "text": text, "num_bytes": _num_bytes(value)}


def _tensor(value: torch.Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"


def _plain(name: str, value: Any) -> str:
    if issubclass(type(value), types.FunctionType | types.BuiltinFunctionType | type):
        return ""
    return named(name, value)


def _num_bytes(value: Any) -> int | None:
    try:
        if issubclass(type(value), torch.Tensor):
            return _tensor_bytes(value)
        if issubclass(type(value), torch.nn.Module):
            held = [*value.parameters(), *value.buffers()]
            return sum(_tensor_bytes(tensor) for tensor in held)
        if issubclass(type(value), torch.optim.Optimizer):
            states = [state for state in list(value.state.values()) if isinstance(state, dict)]
            return sum(_tensor_bytes(t) for state in states for t in state.values() if isinstance(t, torch.Tensor))
    except (RuntimeError, AttributeError, NotImplementedError):  # changed by the other thread meanwhile, or meta
        return None
    num_bytes = getattr(value, "nbytes", None) if type(value).__module__.split(".")[0] == "numpy" else None
    return int(num_bytes) if isinstance(num_bytes, int) else None


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
