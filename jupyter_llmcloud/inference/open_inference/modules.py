"""Any `torch.nn.Module` by its forward: an architecture of a cell with the weights of its run, or an object."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from jupyter_llmcloud.inference.open_inference import joining
from jupyter_llmcloud.inference.open_inference.cell_code import described
from jupyter_llmcloud.inference.open_inference.joining import Payload
from jupyter_llmcloud.inference.open_inference.messages import InferRequest
from jupyter_llmcloud.inference.open_inference.predictor import ModelMetadata, PredictionFailed, TensorMetadata
from jupyter_llmcloud.inference.open_inference.samples import sample_of
from jupyter_llmcloud.inference.open_inference.tensors import BYTES, InvalidInput, Tensor

log = logging.getLogger(__name__)

_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class ModulePredictor:
    """Calls `forward` with tensors by the names of its parameters.

    Requests that come together are put into one batch after a first such batch has given what each gives alone.
    """

    kind = "module"

    def __init__(self, module: torch.nn.Module, max_rows: int) -> None:
        self.max_rows = max_rows
        self._module = module.eval()
        self._parameters = _parameters(module)
        self.details: dict[str, Any] = {
            "module": type(module).__name__,
            "inputs": sample_of(module, self._parameters[1]),
        }
        self._floats = _floating(module)
        self._joins: bool | None = None  # not tried yet

    def metadata(self) -> ModelMetadata:
        """Its inputs by name; of what shape they are only the module knows."""
        inputs = [TensorMetadata(name, "FP32" if self._floats else "INT64", (-1,)) for name in self._parameters[0]]
        return ModelMetadata("pytorch", inputs, (), self.details)

    def rows(self, asked: InferRequest) -> list[Any]:
        """Raises InvalidInput."""
        if asked.tensors is None:
            payload = Payload.of_tensors(self._of_json(asked.value))
        else:
            payload = Payload.of_tensors(asked.tensors)
        names, required, takes_any = self._parameters
        given = payload.value
        if len(given) == 1 and len(required) <= 1 and names and not set(given) & set(names):
            payload = Payload({names[0]: next(iter(given.values()))}, payload.size, (names[0], payload.key))
        elif unknown := [name for name in given if name not in names and not takes_any]:
            raise InvalidInput(f"forward has no parameter {unknown[0]!r:.60}: it takes {', '.join(names) or 'none'}")
        if missing := [name for name in required if name not in payload.value]:
            raise InvalidInput(f"forward needs {missing[0]!r}: it takes {', '.join(names)}")
        if any(array.dtype == object for array in payload.value.values()):
            raise InvalidInput(f"a torch.nn.Module takes numbers, not {BYTES}")
        return [payload]

    def _of_json(self, value: Any) -> dict[str, Tensor]:
        named = value if isinstance(value, dict) else {(self._parameters[0] or ["input"])[0]: value}
        tensors = {}
        for name, item in named.items():
            try:
                array = np.asarray(item)
            except ValueError as error:
                raise InvalidInput(f"inputs cannot be made an array: {error}") from None
            if array.dtype.kind not in "fiub":
                raise InvalidInput("inputs must be numbers in lists, all of one shape")
            if array.dtype.kind == "f" or (array.dtype.kind in "iu" and self._floats):  # 1 is a number like 1.0 in JSON
                array = array.astype(np.float32)
            tensors[name] = Tensor.of(name, array)
        return tensors

    def predict(self, rows: list[Any]) -> list[Any]:
        """What forward returned for each, as arrays by name, or what it raised."""
        results: list[Any] = [None] * len(rows)
        for group in joining.groups(rows, max(1, self.max_rows)):
            for index, result in zip(group, self._computed([rows[index] for index in group]), strict=True):
                results[index] = result
        return results

    def _computed(self, payloads: list[Payload]) -> list[Any]:
        if len(payloads) == 1 or self._joins is False:
            return [self._alone(payload) for payload in payloads]
        try:
            joined = self._forward(joining.join(payloads))
            results = joining.split(joined, [payload.size or 0 for payload in payloads])
        except Exception as error:
            log.info("requests are computed apart: %s", error)
            return [self._alone(payload) for payload in payloads]
        if self._joins is None:
            alone = [self._alone(payload) for payload in payloads]
            if any(isinstance(result, Exception) for result in alone):
                return alone
            self._joins = all(_alike(one, two) for one, two in zip(alone, results, strict=True))
            if not self._joins:
                log.warning("requests are computed one at a time: a batch gives other results than its rows alone")
            return alone
        return results

    def _alone(self, payload: Payload) -> Any:
        try:
            return self._forward(payload.value)
        except Exception as error:
            return PredictionFailed(described(error))

    def _forward(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        first = next(self._module.parameters(), None)
        inputs = {name: _input(array, first) for name, array in arrays.items()}
        with torch.inference_mode():
            outputs = self._module(**inputs)
        return {name: _output(value) for name, value in _named(outputs).items()}

    def reply(self, asked: InferRequest, results: list[Any]) -> dict[str, Tensor] | Any:
        """The outputs by name; as JSON the value itself when there is one."""
        [value] = results
        if not asked.is_json:
            return joining.as_tensors(value)
        return next(iter(value.values())) if set(value) == {"output"} else value

    def close(self) -> None:
        """Nothing is held beside memory."""


def _parameters(module: torch.nn.Module) -> tuple[list[str], list[str], bool]:
    """The names of what forward takes, those it needs, and whether it takes any other."""
    try:
        known = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ["input"], ["input"], True
    named = [item for item in known if item.kind in _NAMED]
    names, required = [item.name for item in named], [item.name for item in named if item.default is item.empty]
    return names, required, any(item.kind is item.VAR_KEYWORD for item in known)


def _floating(module: torch.nn.Module) -> bool:
    """Whether its first layer takes numbers, and no ids."""
    layers = [layer for layer in module.modules() if not list(layer.children())]
    return not (layers and isinstance(layers[0], torch.nn.Embedding))


def _input(array: Any, parameter: torch.Tensor | None) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if parameter is None:
        return tensor
    return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)


def _named(outputs: Any) -> dict[str, Any]:
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if isinstance(outputs, tuple | list) and len(outputs) > 1:
        found = {f"output_{number}": value for number, value in enumerate(outputs)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    value = outputs[0] if isinstance(outputs, tuple | list) else outputs
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"forward returned a {type(value).__name__}, and no tensor")
    return {"output": value}


def _output(value: torch.Tensor) -> Any:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16,) else value).numpy()


def _alike(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return set(one) == set(two) and all(
        one[name].shape == two[name].shape and np.allclose(one[name], two[name], rtol=1e-4, atol=1e-5, equal_nan=True)
        for name in one
    )
