"""Python code as a model: the functions of a cell, a function, or an object with `predict`."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jupyter_llmcloud.core.serving.models.cell_source import CellSource
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.open_inference import joining
from jupyter_llmcloud.inference.open_inference.cell_code import RAISED, described, execute
from jupyter_llmcloud.inference.open_inference.joining import Payload
from jupyter_llmcloud.inference.open_inference.messages import InferRequest
from jupyter_llmcloud.inference.open_inference.predictor import ModelMetadata, PredictionFailed
from jupyter_llmcloud.inference.open_inference.tensors import InvalidInput, Tensor

log = logging.getLogger(__name__)

OnThread = Callable[[Callable[[], Any]], Awaitable[Any]]
_END = object()


@dataclass(frozen=True)
class Functions:
    """What a user's code gives.

    Attributes:
        predict: the inputs of a request to its outputs; stream: to their pieces, one after another.
        max_rows: rows of several requests may be put together, so many at most; 0: every request has a call of its own.
        name: what computes it, in the metadata.
    """

    predict: Callable[[Any], Any]
    stream: Callable[[Any], Any] | None = None
    max_rows: int = 0
    name: str = "python"


class PythonModel:
    """Calls a user's functions, one call at a time. A coroutine function runs in one event loop of the thread."""

    kind = "python"

    def __init__(self, functions: Functions, loop: asyncio.Runner | None = None) -> None:
        self._functions = functions
        self._loop = loop or asyncio.Runner()
        self.max_rows = max(1, functions.max_rows)
        self.details: dict[str, Any] = {"batches": functions.max_rows, "streams": functions.stream is not None}
        if functions.stream is not None:
            self.stream = self._stream

    def metadata(self) -> ModelMetadata:
        """Nothing is known of inputs and outputs: the code takes what it takes."""
        return ModelMetadata(self._functions.name, details=self.details)

    def rows(self, asked: InferRequest) -> list[Any]:
        """The request as a whole is one row here: its own rows are put together with others in `predict`."""
        if asked.tensors is None:
            return [Payload.of_json(asked.value)]
        return [Payload.of_tensors(asked.tensors)]

    def predict(self, rows: list[Any]) -> list[Any]:
        """What the user's function returned for each, or what it raised."""
        results: list[Any] = [None] * len(rows)
        separate = [[index] for index in range(len(rows))]
        most = self._functions.max_rows
        for group in list(joining.groups(rows, most)) if most else separate:
            for index, result in zip(group, self._call([rows[index] for index in group]), strict=True):
                results[index] = result
        return results

    def _call(self, payloads: list[Payload]) -> list[Any]:
        try:
            outputs = self._run(self._functions.predict, joining.join(payloads))
            if not self._functions.max_rows or payloads[0].size is None:
                return [outputs]
            return joining.split(outputs, [payload.size or 0 for payload in payloads])
        except InvalidInput as error:
            return [error] * len(payloads)
        except RAISED as error:
            if len(payloads) > 1:  # whose row it was is found out by asking each alone
                return [result for payload in payloads for result in self._call([payload])]
            return [PredictionFailed(described(error))]

    def _run(self, function: Callable[[Any], Any], inputs: Any) -> Any:
        value = function(inputs)
        return self._loop.run(_awaited(value)) if inspect.isawaitable(value) else value

    def reply(self, asked: InferRequest, results: list[Any]) -> dict[str, Tensor] | Any:
        """The value itself, or the arrays in it."""
        [value] = results
        return value if asked.is_json else joining.as_tensors(value)

    async def _stream(self, asked: InferRequest, on_thread: OnThread) -> AsyncIterator[Any]:
        """The pieces. Each step is taken on the thread of the model, so that streams and other requests take turns."""
        [payload] = self.rows(asked)
        assert self._functions.stream is not None
        pieces = await on_thread(lambda: self._step(lambda: self._opened(payload.value)))
        try:
            while (piece := await on_thread(lambda: self._step(lambda: self._next(pieces)))) is not _END:
                yield piece if asked.is_json else joining.as_tensors(piece)
        finally:
            await on_thread(lambda: self._close(pieces))

    def _opened(self, inputs: Any) -> Any:
        assert self._functions.stream is not None
        pieces = self._functions.stream(inputs)
        if inspect.isawaitable(pieces):
            pieces = self._loop.run(_awaited(pieces))
        if hasattr(pieces, "__anext__"):
            return pieces
        return iter(pieces)

    def _next(self, pieces: Any) -> Any:
        if not hasattr(pieces, "__anext__"):
            return next(pieces, _END)
        return self._loop.run(_next_of(pieces))

    def _step(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except InvalidInput:
            raise
        except RAISED as error:
            raise PredictionFailed(described(error)) from error

    def _close(self, pieces: Any) -> None:
        """Whoever asked has gone, or has it all: the generator's `finally` is run."""
        try:
            if hasattr(pieces, "aclose"):
                self._loop.run(_awaited(pieces.aclose()))
            elif hasattr(pieces, "close"):
                pieces.close()
        except RAISED as error:
            log.warning("a stream could not be closed: %s", described(error))

    def close(self) -> None:
        """The loop of the thread is left to the end of the process: another thread may not close it."""


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


async def _next_of(pieces: Any) -> Any:
    return await anext(pieces, _END)


# --- cells ---


def of_cell(source: CellSource) -> PythonModel:
    """Execute a cell and call its `load()`: what it defines as a model. Raises ModelError."""
    namespace = execute(source)
    runner = asyncio.Runner()
    try:
        loaded = namespace["load"]()
        if inspect.isawaitable(loaded):
            loaded = runner.run(_awaited(loaded))
    except RAISED as error:
        raise ModelError(described(error)) from error
    max_rows = namespace.get("max_batch", 0)
    if not isinstance(max_rows, int) or isinstance(max_rows, bool) or max_rows < 0:
        raise ModelError(f"max_batch of the cell is a whole number of 0 or more, not {max_rows!r:.40}")
    stream = namespace.get("stream")
    functions = Functions(
        with_model(namespace["predict"], loaded),
        with_model(stream, loaded) if callable(stream) else None,
        max_rows,
        source.name,
    )
    return PythonModel(functions, runner)


def with_model(function: Any, loaded: Any) -> Any:
    """The function of the inputs alone: one of two parameters gets as its second what `load()` returned."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = [item for item in inspect.signature(function).parameters.values() if item.kind in kinds]
    except (TypeError, ValueError):
        return function
    required = [item for item in parameters if item.default is item.empty]
    if len(required) < 2:
        return function
    first, second = (item.name for item in required[:2])

    def call(inputs: Any) -> Any:
        try:
            return function(inputs, loaded)
        except (TypeError, AttributeError) as error:  # as when each of them is taken for the other
            error.add_note(
                f"{function.__name__} gets the inputs first: {first} was of type {type(inputs).__name__}; then what "
                f"load() returned: {second} was of type {type(loaded).__name__}."
            )
            raise

    return call


# --- objects ---


def of_object(value: Any, max_rows: int) -> Functions:
    """An object with `predict` (an estimator as scikit-learn's: row by row), or a function. Raises TypeError."""
    name = type(value).__name__
    if callable(predict := getattr(value, "predict", None)):
        if callable(load := getattr(value, "load", None)) and not _is_required(load):
            load()
        stream = getattr(value, "stream", None)
        if _is_estimator(value):
            return Functions(_Estimator(value), None, max_rows, name)
        return Functions(predict, stream if callable(stream) else None, int(getattr(value, "max_batch", 0)), name)
    if callable(value):
        return Functions(value, name=getattr(value, "__name__", name))
    raise TypeError(f"a {name} can be served when it is a function, or has a method predict(inputs)")


def _is_required(function: Any) -> bool:
    """Whether it takes arguments that must be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(item.default is item.empty and item.kind not in optional for item in parameters)


def _is_estimator(value: Any) -> bool:
    return hasattr(value, "fit") and hasattr(value, "get_params")


class _Estimator:
    """`predict` of an estimator for arrays, lists and single named tensors, and its probabilities beside it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, inputs: Any) -> dict[str, Any]:
        features = self._features(inputs)
        try:
            outputs = {"predictions": np.asarray(self._value.predict(features))}
            if callable(probabilities := getattr(self._value, "predict_proba", None)):
                outputs["probabilities"] = np.asarray(probabilities(features))
        except ValueError as error:  # what scikit-learn raises for features of another number or type
            raise InvalidInput(f"{type(self._value).__name__}: {error}") from error
        return outputs

    def _features(self, inputs: Any) -> Any:
        if isinstance(inputs, dict):
            if len(inputs) == 1:
                return next(iter(inputs.values()))
            columns = getattr(self._value, "feature_names_in_", None)
            names = [str(name) for name in columns] if columns is not None else list(inputs)
            if missing := [name for name in names if name not in inputs]:
                raise InvalidInput(f"the model needs an input {missing[0]!r}: {', '.join(names)}")
            return np.column_stack([np.asarray(inputs[name]).reshape(-1) for name in names])
        if not isinstance(inputs, list):
            raise InvalidInput("inputs must be a list of rows")
        return inputs
