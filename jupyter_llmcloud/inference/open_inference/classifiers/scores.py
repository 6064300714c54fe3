"""From logits to labels and scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jupyter_llmcloud.inference.open_inference.predictor import TensorMetadata
from jupyter_llmcloud.inference.open_inference.tensors import BYTES, Array, Tensor

MULTI = "multi_label_classification"
_THRESHOLD = 0.5


@dataclass(frozen=True)
class Labels:
    """The labels of a model and what its logits mean.

    Attributes:
        problem: "regression" (the logits are the predicted numbers), "multi_label_classification" (each label has a
            probability of its own, by the logistic function) or "single_label_classification" (by softmax).
    """

    names: tuple[str, ...]
    problem: str

    @classmethod
    def of(cls, config: Any, kind: str) -> Labels:
        """As the configuration of a model of transformers has them."""
        named = {int(index): str(label) for index, label in (config.id2label or {}).items()}
        names = tuple(named.get(index, f"LABEL_{index}") for index in range(config.num_labels))
        problem = getattr(config, "problem_type", None)
        # The softmax of one number is 1, whatever that is: as transformers has it, it is a predicted number.
        if kind == "regressor" or problem == "regression" or (problem is None and len(names) == 1):
            return cls(names, "regression")
        return cls(names, MULTI if problem == MULTI else "single_label_classification")

    def scores(self, logits: Array) -> Array:
        """Probabilities over the last axis, float32; of a regression the logits."""
        if self.problem == "regression":
            return logits
        values = logits.astype(np.float64)
        if self.problem == MULTI:
            return _logistic(values).astype(np.float32)
        exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
        return (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(np.float32)

    def details(self) -> dict[str, Any]:
        """For the metadata of the model."""
        return {"labels": list(self.names), "problem": self.problem}

    def metadata(self, leading: tuple[int, ...]) -> list[TensorMetadata]:
        """Of the outputs; `leading` are the sizes before that of the labels."""
        full = (*leading, len(self.names))
        told = [TensorMetadata("logits", "FP32", full), TensorMetadata("scores", "FP32", full)]
        return told if self.problem == "regression" else [*told, TensorMetadata("labels", BYTES, leading)]

    def tensors(self, logits: Array, present: Array | None = None) -> dict[str, Tensor]:
        """`logits`, `scores` and `labels`: the likeliest one, or a JSON list of those of at least one half where
        several may hold. What is not `present` has the label "" and scores of 0."""
        scores = self.scores(logits)
        if present is not None:
            scores = np.where(present[..., None], scores, np.float32(0))
        outputs = {"logits": Tensor("logits", "FP32", logits), "scores": Tensor("scores", "FP32", scores)}
        if self.problem == "regression":
            return outputs
        labels = np.empty(logits.shape[:-1], dtype=object)
        for index in np.ndindex(labels.shape):
            shown = present is None or bool(present[index])
            labels[index] = self._label(scores[index]).encode() if shown else b""
        return {**outputs, "labels": Tensor("labels", BYTES, labels)}

    def _label(self, scores: Array) -> str:
        if self.problem != MULTI:
            return self.names[int(scores.argmax())]
        return json.dumps(self._held(scores))

    def _held(self, scores: Array) -> list[str]:
        return [name for name, score in zip(self.names, scores, strict=True) if score >= _THRESHOLD]

    def told(self, logits: Array) -> list[dict[str, Any]]:
        """An object for each row of `logits`."""
        return [self._object(row, scores) for row, scores in zip(logits, self.scores(logits), strict=True)]

    def _object(self, logits: Array, scores: Array) -> dict[str, Any]:
        if self.problem == "regression":
            values: Sequence[float] = scores.tolist()
            return {"value": values[0]} if len(values) == 1 else {"values": dict(zip(self.names, values, strict=True))}
        by_label = dict(zip(self.names, scores.tolist(), strict=True))
        if self.problem == MULTI:
            return {"labels": self._held(scores), "scores": by_label, "logits": logits.tolist()}
        best = int(scores.argmax())
        label, score = self.names[best], scores.tolist()[best]
        return {"label": label, "score": score, "scores": by_label, "logits": logits.tolist()}


def _logistic(values: Array) -> Array:
    """Without an overflow for large negative values."""
    return 0.5 * (1 + np.tanh(0.5 * values))
