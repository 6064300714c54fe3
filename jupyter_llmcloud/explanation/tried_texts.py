"""A classifier of texts asked texts with typos and the like, and texts of another kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jupyter_llmcloud.core.explain.changes import OUTSIDE, TEXT_CHANGES, changed, shuffled_letters
from jupyter_llmcloud.core.explain.robustness import compared
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.explanation.tried_rows import (
    label_numbers,
    outside_row,
    read_rows,
    tell_header,
    tell_row,
    tell_worst,
)
from jupyter_llmcloud.inference.open_inference.classifiers.scores import MULTI
from jupyter_llmcloud.inference.open_inference.classifiers.text import TextClassifier, TextRow
from jupyter_llmcloud.protocol.explanation import TryRequest
from jupyter_llmcloud.protocol.model_work import Tell, WorkProgress

_AT_ONCE = 32
NO_ANSWER = -1


def try_classifier(opened: OpenedModel, request: TryRequest, tell: Tell) -> None:
    """The tables of a classifier of texts."""
    predictor = TextClassifier(opened.model, opened.tokenizer, opened.kind, _AT_ONCE)
    if predictor.labels.problem in (MULTI, "regression"):
        raise UsageError(
            f"%explain {opened.name} --adversarial: it has not one answer of several, and that is compared."
        )
    rows = read_rows(request, "text")
    texts = [str(row["text"]) for row in rows]
    labels = label_numbers(rows, predictor.labels, request.told)
    told = "" if labels is not None else ", whose labels nobody has told"
    tell_header(opened, f"{len(texts)} texts of {request.told}{told}; changes by seed {request.seed}", tell)
    before, inside = answers_to(predictor, texts)
    tell_row(compared("as they are", before, before, labels), tell)
    all_answers = [before]
    for name, change in TEXT_CHANGES.items():
        tell(WorkProgress(text=f"{opened.name}: {name}"))
        now, _ = answers_to(predictor, changed(texts, change, request.seed))
        all_answers.append(now)
        tell_row(compared(name, now, before, labels), tell)
    tell_worst(all_answers, labels, tell)
    tell_row(outside_row("the data", inside, None), tell)
    for what, others in outside_texts(request, texts):
        tell_row(outside_row(what, answers_to(predictor, others)[1], inside), tell)


def outside_texts(request: TryRequest, texts: list[str]) -> list[tuple[str, list[str]]]:
    """Texts of another kind than the data, by what they are."""
    if request.outside:
        given = [text for text in json.loads(Path(request.outside).read_bytes()) if text.strip()]
        if not given:
            raise UsageError("--outside: the text is empty.")
        first = ("the texts of --outside", given)
    else:
        first = ("code, other languages, numbers", OUTSIDE)
    return [first, ("the data, letters in any order", shuffled_letters(texts, request.seed))]


def answers_to(predictor: TextClassifier, texts: Sequence[str]) -> tuple[list[int], list[float]]:
    """The likeliest label of each, and its probability. A text without tokens has no answer, and a probability of 0."""
    answers: list[int] = []
    confidences: list[float] = []
    for start in range(0, len(texts), _AT_ONCE):
        rows = [TextRow(text, None, True) for text in texts[start : start + _AT_ONCE]]
        for result in predictor.predict(rows):
            if not isinstance(result, tuple):
                answers.append(NO_ANSWER)
                confidences.append(0.0)
                continue
            scores = predictor.labels.scores(result[0])
            answers.append(int(np.argmax(scores)))
            confidences.append(float(np.max(scores)))
    return answers, confidences
