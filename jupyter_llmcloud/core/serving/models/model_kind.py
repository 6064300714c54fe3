"""What a model is for, told from the names in its config.json before anything is loaded.

The class names of transformers say it by their endings (`BertForSequenceClassification`, `GPT2LMHeadModel`), also those
of classes that are not installed. A model whose kind is not known is never taken for a generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

ModelKind = Literal[
    "generator",
    "embedder",
    "classifier",
    "regressor",
    "token-classifier",
    "image-classifier",
    "module",
    "python",
    "unknown",
]
KINDS: tuple[str, ...] = get_args(ModelKind)
GENERATOR: ModelKind = "generator"
EMBEDDER: ModelKind = "embedder"
# In this order: the first that a name holds decides.
_PARTS: tuple[tuple[str, ModelKind], ...] = (
    ("ForSequenceClassification", "classifier"),
    ("ForTokenClassification", "token-classifier"),
    ("ForImageClassification", "image-classifier"),
    ("ForCausalLM", "generator"),
    ("LMHead", "generator"),
    ("DoubleHeads", "generator"),
    ("ForConditionalGeneration", "generator"),
    ("ForSeq2SeqLM", "generator"),
    ("ForQuestionAnswering", "unknown"),
    ("ForMaskedLM", "embedder"),
    ("ForPreTraining", "embedder"),
)
_WORDS: dict[str, str] = {
    "generator": "generates text",
    "embedder": "turns texts into vectors",
    "classifier": "classifies texts",
    "regressor": "predicts numbers from texts",
    "token-classifier": "classifies the tokens of texts",
    "image-classifier": "classifies images",
    "module": "is a torch.nn.Module with a forward of its own",
    "python": "is Python code of a cell",
    "unknown": "is of no kind that can be served",
}


_INPUTS: dict[str, str] = {
    "image-classifier": '"BASE64 of a file"',
    "module": '"NUMBERS IN LISTS"',
    "python": '"WHAT ITS predict TAKES"',
}


def sample_inputs(kind: str, told: str = "") -> str:
    """JSON that stands for `inputs` in an example of a request; `told` by what is served, where it knows better."""
    return told or _INPUTS.get(kind, '["Hello"]')


def kind_of_config(config: Mapping[str, Any]) -> ModelKind:
    """The kind of a model with this config.json.

    No architecture named at all is taken for a generator, as `AutoModelForCausalLM` takes it: what was saved without
    one is told by its weights when it is loaded.
    """
    named = config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    kind = kind_of_names(names)
    if kind == "classifier" and _is_regression(config):
        return "regressor"
    return kind


def kind_of_names(names: Iterable[str]) -> ModelKind:
    """The kind that the class names of `architectures` tell."""
    kinds = [_kind_of_name(name) for name in names]
    return next((kind for kind in kinds if kind != "unknown"), "unknown" if kinds else GENERATOR)


def _kind_of_name(name: str) -> ModelKind:
    for part, kind in _PARTS:
        if part in name:
            return kind
    if name.endswith(("Model", "Encoder")) and "For" not in name:
        return "embedder"
    return "unknown"


def _is_regression(config: Mapping[str, Any]) -> bool:
    """As transformers decides it: by the problem type, else by whether there is one label only."""
    if (problem := config.get("problem_type")) is not None:
        return bool(problem == "regression")
    labels = config.get("id2label")
    num_labels: object = config.get("num_labels", len(labels) if isinstance(labels, Mapping) else 2)
    return num_labels == 1


def kind_of_adapter(task: Any, base: ModelKind) -> ModelKind:
    """The kind of an adapter of PEFT by its `task_type`, on a base of kind `base`."""
    kinds: dict[Any, ModelKind] = {
        "SEQ_CLS": "classifier",
        "TOKEN_CLS": "token-classifier",
        "CAUSAL_LM": "generator",
        "SEQ_2_SEQ_LM": "generator",
        "FEATURE_EXTRACTION": "embedder",
    }
    return kinds.get(task, base)


def says(kind: str) -> str:
    """What a model of this kind does, in words: "classifies texts"."""
    return _WORDS.get(kind, kind)


def not_a_generator(name: str, kind: str, base: str = "/llmcloud") -> str:
    """What whoever asks such a model for text is told."""
    if kind == EMBEDDER:
        return f"model {name!r} {says(kind)}, it generates no text. Ask it by POST {base}/v1/embeddings."
    return (
        f"model {name!r} {says(kind)}, it generates no text. Ask it by the Open Inference Protocol: "
        f"POST {base}/v2/models/{name}/infer."
    )


def why_not_instead(name: str, before: str, after: str, target: str) -> str:
    """Why a model of kind `after` cannot take over from one of kind `before`, or a share of it; "" when it can."""
    if _asked_by(before) == _asked_by(after):
        return ""
    return (
        f"endpoint {name!r} {says(before)}, and {target} {says(after)}: whoever asks {name!r} would get errors. "
        f"Serve it under a name of its own, or stop {name!r} first."
    )


def _asked_by(kind: str) -> str:
    return kind if kind in (GENERATOR, EMBEDDER) else "the Open Inference Protocol"
