"""What the process that explains models is asked, and what it tells: a line of JSON each."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.protocol.model_work import Failed, WorkProgress


class ExplainRequest(msgspec.Struct, kw_only=True, frozen=True, tag="explain"):
    """Say which parts of an input led to an answer.

    Attributes:
        target: a run, or a folder.
        text: what a model of texts is asked.
        file: what another one is asked: an image, or an array as numpy saves it.
        num_new: tokens that are generated, and explained one by one.
        answer: a text that is explained in place of what would be generated.
        label: of a classifier, the class that is explained; "": the likeliest.
        method: integrated-gradients or ablation; "": what the model takes.
        steps: of the integral, at first.
        base_model: of an adapter, the folder of its base model; "": the one it names.
    """

    target: str
    text: str = ""
    file: str = ""
    num_new: int = 1
    answer: str = ""
    label: str = ""
    method: str = ""
    steps: int = 32
    base_model: str = ""


class TryRequest(msgspec.Struct, kw_only=True, frozen=True, tag="try"):
    """Ask a model inputs that are changed, and such as it was not made for.

    Attributes:
        rows: a file with the inputs: JSON rows with `text` or `file` and perhaps `label`, or arrays of numpy.
        told: what they are.
        outside: a file with JSON, texts of another kind; "": those that are here.
        num_rows: how many are tried at most.
        seed: of what is changed.
    """

    target: str
    rows: str
    told: str = ""
    outside: str = ""
    num_rows: int = 200
    seed: int = 0
    base_model: str = ""


Request = ExplainRequest | TryRequest


class ExplainedModel(msgspec.Struct, kw_only=True, frozen=True, tag="model"):
    """What is explained, and how.

    Attributes:
        source: the run or the folder that its weights are from.
        kind: what the model is for.
        method: how the scores were found.
        baseline: what stands for an input that tells nothing.
        answer: of a generator, the text that its tokens are together.
    """

    name: str
    kind: str
    method: str
    baseline: str
    source: str = ""
    answer: str = ""


class Attribution(msgspec.Struct, kw_only=True, frozen=True, tag="attribution"):
    """Scores of the parts of an input for one answer.

    Attributes:
        answer: a token, a label.
        quantity: what the scores add up to: how far it is for this input from what it is for the baseline.
        value: of that quantity.
        baseline_value: of the same without the input.
        probability: of the answer, where there is one.
        tokens: the parts; none for an array.
        scores: one for each, positive where it speaks for the answer.
        num_given: how many of the tokens were given; what follows them was generated.
        shape: of the scores of an array, which are told row by row.
        difference: of the sum of the scores from what they should add up to.
        steps: that it took.
        picture: a PNG in base64, of an image under its scores.
    """

    answer: str
    quantity: str
    value: float
    baseline_value: float
    scores: list[float]
    tokens: list[str] = []
    probability: float | None = None
    num_given: int = 0
    shape: list[int] = []
    difference: float = 0.0
    steps: int = 0
    picture: str = ""


class TriedModel(msgspec.Struct, kw_only=True, frozen=True, tag="tried"):
    """What was tried on what.

    Attributes:
        source: the run or the folder that its weights are from.
        kind: what the model is for.
        caption: what the figures are of.
    """

    name: str
    kind: str
    caption: str
    source: str = ""


class TriedChange(msgspec.Struct, kw_only=True, frozen=True, tag="change"):
    """The fields of a `TriedInputs` or an `OutsideInputs` of core.explain.robustness, by which one it is."""

    is_outside: bool
    row: dict[str, Any]


Event = WorkProgress | ExplainedModel | Attribution | TriedModel | TriedChange | Failed
