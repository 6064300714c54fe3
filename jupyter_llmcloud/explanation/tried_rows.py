"""The rows that a model is tried with, and what is told of its answers to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jupyter_llmcloud.core.explain.robustness import SURE, OutsideInputs, TriedInputs, separation, worst
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.inference.open_inference.classifiers.scores import Labels
from jupyter_llmcloud.protocol.explanation import TriedChange, TriedModel, TryRequest
from jupyter_llmcloud.protocol.model_work import Tell


def read_rows(request: TryRequest, key: str) -> list[dict[str, Any]]:
    """The rows that the client has written, as many as are wanted, spread over all. Raises UsageError."""
    rows: list[dict[str, Any]] = json.loads(Path(request.rows).read_bytes())
    if not rows or not all(isinstance(row.get(key), str) for row in rows):
        raise UsageError(f"--adversarial {request.told}: each row needs a {key}.")
    return spread(rows, request.num_rows)


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """So many of them, at equal distances."""
    if len(rows) <= count:
        return list(rows)
    return [rows[number * len(rows) // count] for number in range(count)]


def label_numbers(rows: Sequence[dict[str, Any]], labels: Labels, told: str) -> list[int | None] | None:
    """The labels of rows as numbers; None when there are none. Raises UsageError for one that the model has not."""
    given = [row.get("label") for row in rows]
    if all(label is None for label in given):
        return None
    are_names = all(str(label) in labels.names for label in given)  # also numbers, where labels are called 1 to 5
    numbers: list[int | None] = []
    for label in given:
        if (are_names or isinstance(label, str)) and str(label) in labels.names:
            numbers.append(labels.names.index(str(label)))
        elif isinstance(label, int | float | str) and str(label).isdigit() and int(label) < len(labels.names):
            numbers.append(int(label))
        else:
            known = ", ".join(labels.names[:20])
            raise UsageError(f"--adversarial {told}: the label {label!r:.60} is none of the model's: {known}.")
    return numbers


def tell_header(opened: OpenedModel, caption: str, tell: Tell) -> None:
    """What the figures are of."""
    tell(TriedModel(name=opened.name, kind=opened.kind, caption=caption, source=opened.source))


def tell_row(row: TriedInputs | OutsideInputs, tell: Tell) -> None:
    """A row of one of the tables."""
    tell(TriedChange(is_outside=isinstance(row, OutsideInputs), row=asdict(row)))


def tell_worst(answers: Sequence[Sequence[int]], labels: Sequence[int | None] | None, tell: Tell) -> None:
    """Rows that stand all changes."""
    if (found := worst(answers, labels)) is not None:
        tell_row(found, tell)


def outside_row(what: str, confidences: Sequence[float], inside: Sequence[float] | None) -> OutsideInputs:
    """How sure the answers are; `inside`: those to the data, None where these are."""
    return OutsideInputs(
        what,
        len(confidences),
        sum(confidences) / len(confidences),
        sum(confidence >= SURE for confidence in confidences),
        None if inside is None else separation(inside, confidences),
    )
