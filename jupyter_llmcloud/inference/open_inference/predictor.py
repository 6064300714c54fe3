"""What a model behind the Open Inference Protocol is: rows in, a result for each row out. No torch and no HTTP here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jupyter_llmcloud.inference.open_inference.messages import InferRequest
from jupyter_llmcloud.inference.open_inference.tensors import Tensor

Row = Any
Result = Any


class PredictionFailed(Exception):
    """The model raised while it computed; the text is for whoever asked."""


@dataclass(frozen=True)
class TensorMetadata:
    """An input or an output, as the protocol tells of it; a size of -1 may be any."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class ModelMetadata:
    """What a model takes and gives.

    Attributes:
        platform: what computes it.
        details: more about it, such as the names of its labels.
    """

    platform: str
    inputs: Sequence[TensorMetadata] = ()
    outputs: Sequence[TensorMetadata] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class Predictor(Protocol):
    """Computes rows. All but `rows` and `reply` is called from one thread, one call at a time.

    Attributes:
        kind: what the model is for, as in `core.serving.models.model_kind`.
        max_rows: of one call of `predict`; 1: every row alone.
        details: what else /readyz tells of it.
    """

    kind: str
    max_rows: int
    details: dict[str, Any]

    def metadata(self) -> ModelMetadata:
        """What it takes and gives."""
        ...

    def rows(self, asked: InferRequest) -> list[Row]:
        """The rows of a request, at least one; raises InvalidInput."""
        ...

    def predict(self, rows: list[Row]) -> list[Result]:
        """A result for each row. An exception in the place of one fails the request that it is of, and no other."""
        ...

    def reply(self, asked: InferRequest, results: list[Result]) -> dict[str, Tensor] | Any:
        """The outputs of a request by name; any JSON value when the request has `is_json`."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...
