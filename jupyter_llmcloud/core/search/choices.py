"""Samplers and pruners as they are written: `tpe`, `asha,min=2,reduction=3`; choices as a study can keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.options import did_you_mean
from jupyter_llmcloud.errors import UsageError

SAMPLERS = ("tpe", "gp", "cmaes", "grid", "random")
# What may follow the name of a pruner, with the least value of each.
PRUNERS: Mapping[str, Mapping[str, int]] = {
    "none": {},
    "asha": {"min": 1, "reduction": 2},
    "hyperband": {"min": 1, "max": 1, "reduction": 2},
    "median": {"startup": 0, "warmup": 0},
    "patient": {"patience": 0},
    "pbt": {"population": 2, "share": 1, "resample": 0},
}
PRUNES_NONE = ("none", "pbt")  # which end no trial early


@dataclass(frozen=True)
class PrunerChoice:
    """A pruner and its settings; what is left out is Optuna's own default."""

    name: str
    settings: Mapping[str, int]


def read_pruner(text: str) -> PrunerChoice:
    """`asha,reduction=3` as a choice. Raises UsageError."""
    name, *parts = [part.strip() for part in text.split(",")]
    if name not in PRUNERS:
        raise UsageError(f"{text!r} is not possible: choose one of {', '.join(PRUNERS)}.{did_you_mean(name, PRUNERS)}")
    return PrunerChoice(name, dict(_setting(name, part) for part in parts))


def _setting(pruner: str, text: str) -> tuple[str, int]:
    known = PRUNERS[pruner]
    name, _, value = text.partition("=")
    if name not in known:
        allowed = f"{pruner} takes {', '.join(known)}" if known else f"{pruner} takes no settings"
        raise UsageError(f"{text!r} is not possible: {allowed}.")
    if not value.isascii() or not value.isdigit() or int(value) < known[name]:
        raise UsageError(f"{text!r}: expected a whole number of at least {known[name]} after {name}=.")
    return name, int(value)


def checked_pruner(text: str) -> str:
    """The same text, once it can be read. Raises UsageError."""
    read_pruner(text)
    return text


def kept_choices(choices: Sequence[Any]) -> list[Any]:
    """Choices as a study keeps them: what is no text, number, True, False or None by its name, or as it is shown.

    A script that a trial is exported to has the text of this function in it: it needs nothing from outside.
    """
    import re

    plain = (bool, int, float, str, type(None))
    shown = [
        item
        if isinstance(item, plain)
        else re.sub(" at 0x[0-9a-f]+", "", str(getattr(item, "__name__", None) or repr(item)))
        for item in choices
    ]
    again = [not isinstance(item, plain) and shown.count(label) > 1 for item, label in zip(choices, shown, strict=True)]
    return [f"{label} #{at}" if again[at] else label for at, label in enumerate(shown)]
