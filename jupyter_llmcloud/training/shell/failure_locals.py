"""The variables of the notebook line that failed, as short texts that can be stored: bounded, and without secrets.

No code of the values is run but that of built-in types: a `__repr__` may take minutes, start a collective or tell a
password. Hence what a value is is asked of its type: `isinstance` asks its `__class__`, too, and a weak proxy whose
object has gone, or a proxy outside of its context, raises there.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import os
import pathlib
import re
import types
from collections.abc import Collection, Mapping
from typing import Any

import torch

from jupyter_llmcloud.core.run import stacks
from jupyter_llmcloud.training.diagnostics.stack_location import CellNumber

MAX_NAMES = 30
MAX_TEXT = 200
MAX_ITEMS = 6
MAX_DEPTH = 3
MIN_SECRET = 8  # characters: TOKENIZERS_PARALLELISM=false is none
MAX_AVERAGED = 1 << 20  # elements: the mean of more would take long

_SECRET = re.compile(r"token|key|passw|secret|credential|authorization|cookie", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"\b(hf|sk|pk|ghp|gho|glpat|xox[a-z])[-_][\w-]{8,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|Bearer \S+"
)
_PLAIN = (bool, int, float, complex, type(None), range, slice, decimal.Decimal, datetime.date, datetime.timedelta)
_SETTLED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
_MASK = "***"


def of_failure(
    error: BaseException, cell_number: CellNumber, given: Collection[str] = ()
) -> tuple[str, dict[str, str]]:
    """(place, name -> text) of the innermost notebook frame of a traceback; `given`: names that nobody asks for."""
    frame = None
    number = line = 0
    step = error.__traceback__
    while step is not None:
        if (found := cell_number(step.tb_frame.f_code.co_filename)) is not None:
            frame, number, line = step.tb_frame, found, step.tb_lineno
        step = step.tb_next
    if frame is None:
        return "", {}
    function = frame.f_code.co_name
    place = stacks.place(number, frame.f_code.co_filename, line) + ("" if function == "<module>" else f" in {function}")
    values = {
        name: value
        for name, value in frame.f_locals.items()
        if not name.startswith("_") and name not in given and not issubclass(type(value), _SETTLED)
    }
    used = set(frame.f_code.co_names) | set(frame.f_code.co_varnames)
    names = sorted(values, key=lambda name: name not in used)[:MAX_NAMES]  # sorted() keeps the order within the two
    return place, {name: named(name, values[name]) for name in names}


def named(name: str, value: Any) -> str:
    """The text of a variable; masked when its name speaks of a secret."""
    try:
        is_secret = _is_secret(name, value)
    except Exception:  # of a mapping of the user's own
        is_secret = True
    if is_secret:
        return _MASK
    text = short(value)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _is_secret(name: str, value: Any) -> bool:
    """Numbers are none, whatever they are called: token_ids, num_key_value_heads."""
    if not _SECRET.search(name):
        return False
    if issubclass(type(value), Mapping | list | tuple | set):
        return any(_is_secret(name, item) for item in (value.values() if issubclass(type(value), Mapping) else value))
    return issubclass(type(value), str | bytes)


def short(value: Any, depth: int = 0) -> str:
    """A value in few words."""
    try:
        return _short(value, depth)
    except Exception as error:
        return f"<{type(value).__name__}, not readable: {type(error).__name__}>"


def _short(value: Any, depth: int) -> str:
    kind = type(value)
    if issubclass(type(value), torch.Tensor):
        return _tensor(value)
    if issubclass(type(value), torch.nn.Module):
        return f"{kind.__name__} with {sum(parameter.numel() for parameter in value.parameters()):,} parameters"
    if kind in _PLAIN or kind in (datetime.datetime, datetime.date):
        return repr(value)
    if kind in (str, bytes):
        return _text(value)
    if issubclass(type(value), pathlib.PurePath):
        return f"{kind.__name__}({_text(str(value))})"
    if issubclass(type(value), enum.Enum):
        return f"{kind.__name__}.{value.name}"
    if shape := getattr(value, "shape", None):
        return f"{kind.__name__}{tuple(shape)} {getattr(value, 'dtype', '')}".rstrip()
    return _container(value, kind, depth)


def _text(value: str | bytes) -> str:
    text = value if isinstance(value, str) else value.decode("utf-8", "replace")
    hidden = text
    for secret in _secrets_of_environment():
        hidden = hidden.replace(secret, _MASK)
    head = repr((value if hidden == text else hidden)[:MAX_TEXT])
    return _SECRET_TEXT.sub(_MASK, head) + (f" and {len(value) - MAX_TEXT} more" if len(value) > MAX_TEXT else "")


def holds_secret(value: Any) -> bool:
    """Whether this is a text with a secret of the environment in it, which the cell finds there again."""
    return issubclass(type(value), str) and any(secret in value for secret in _secrets_of_environment())


def _secrets_of_environment() -> list[str]:
    """Values that a variable of whatever name may hold: HF_TOKEN, WANDB_API_KEY and their like."""
    return [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= MIN_SECRET]


def _tensor(value: torch.Tensor) -> str:
    words = f"{type(value).__name__}{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    # On a GPU, or in a distributed tensor, a mean could wait for a collective that never ends.
    readable = type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu"
    if not readable or not 0 < value.numel() <= MAX_AVERAGED or value.is_complex() or value.layout != torch.strided:
        return words
    with torch.no_grad():
        if value.numel() == 1:
            return f"{words}, value {value.item():.6g}"
        return f"{words}, mean {value.double().mean().item():.6g}"


def _container(value: Any, kind: type, depth: int) -> str:
    deep = depth >= MAX_DEPTH
    if kind in (list, tuple, set, frozenset):
        items = [short(item, depth + 1) for item, _ in zip(value, range(0 if deep else MAX_ITEMS), strict=False)]
        return f"{kind.__name__} of {len(value)}" + (f": {', '.join(items)}" if items else "")
    if issubclass(type(value), Mapping):
        rows = [] if deep else _pairs(value.items(), depth)
        return f"{kind.__name__} of {len(value)}" + (f": {', '.join(rows)}" if rows else "")
    attributes = [] if deep else _pairs(getattr(value, "__dict__", {}).items(), depth)
    return f"{kind.__name__}({', '.join(attributes)})"


def _pairs(items: Any, depth: int) -> list[str]:
    rows = []
    for (key, value), _ in zip(items, range(MAX_ITEMS), strict=False):
        name = key if issubclass(type(key), str) else short(key, depth + 1)
        rows.append(f"{name[:40]}={_MASK if _is_secret(name, value) else short(value, depth + 1)}")
    return rows
