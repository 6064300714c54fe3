"""A variable that is served: what stands in that part, and which tokenizer belongs to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jupyter_llmcloud.errors import UsageError

MODEL, TOKENIZER, CODE = "model", "tokenizer", "code"
_RAW_TOKENIZERS = {("tokenizers", "Tokenizer")}
_USUAL = ("tokenizer", "processor", "image_processor", "feature_extractor")


def role_of(value: Any) -> str:
    """What a value can be served as: a model, the tokenizer (or processor) beside one, code; "" for anything else.

    Told by its class alone: nothing that the value has written itself is run, and no library is imported for it.
    """
    kind = type(value)
    if issubclass(type(value), type):
        return ""
    if any((base.__module__, base.__name__) == ("torch.nn.modules.module", "Module") for base in kind.__mro__):
        return MODEL
    if (kind.__module__, kind.__name__) in _RAW_TOKENIZERS:
        return TOKENIZER
    if hasattr(kind, "save_pretrained") and hasattr(kind, "model_input_names"):
        return TOKENIZER
    return CODE if callable(value) or callable(getattr(kind, "predict", None)) else ""


def choose_tokenizer(model: str, given: str | None, roles: Mapping[str, str], where: str) -> str | None:
    """The variable with the tokenizer of a model: the one that is named, else the one that is there.

    Args:
        model: the variable with the model.
        given: as `--tokenizer` says.
        roles: of the variables there are, by name.
        where: they are, in words.

    Returns:
        None when there is none. Raises UsageError when the named one is none, or when several could be meant.
    """
    if given is not None:
        if roles.get(given) != TOKENIZER:
            known = "is none" if given in roles else f"is not {where}"
            raise UsageError(f"--tokenizer {given}: name a variable with a tokenizer; {given} {known}.")
        return given
    found = [name for name, role in roles.items() if role == TOKENIZER]
    usual = [name for name in (f"{model}_tokenizer", *_USUAL) if name in found]
    if usual or len(found) < 2:
        return next(iter([*usual, *found]), None)
    raise UsageError(
        f"{model} could have any of {_listed(found)} beside it: say which one, with --tokenizer {sorted(found)[0]}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))
