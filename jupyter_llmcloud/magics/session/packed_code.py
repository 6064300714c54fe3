"""The user's own steps and tokenizer, on their way to the workers that prepare data."""

from __future__ import annotations

import base64
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jupyter_llmcloud.core.data.step_names import check_step
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer

_PLAIN = (str, int, float, bool, bytes, type(None))


def pack(steps: Sequence[str | Callable[[Any], Any]], tokenizer: Any, name: str | None) -> dict[str, Any]:
    """Steps and a tokenizer as the body of a request.

    Args:
        tokenizer: an object; None: the one that is called `name`, if any.
    """
    import cloudpickle

    own: dict[str, Any] = {}
    told: list[dict[str, str]] = []
    for step in steps:
        if isinstance(step, str):
            told.append({"name": check_step(step)})
        elif not callable(step):
            raise UsageError(f"steps: {step!r:.60} is neither the name of a step nor a function.")
        else:
            base = getattr(step, "__name__", type(step).__name__)
            free = next(n for n in [base, *(f"{base}-{i}" for i in range(2, 100))] if n not in own)
            own[free] = step
            told.append({"name": free, "source_hash": source_hash(step)})
    kept, packed = None, None
    if tokenizer is not None or name is not None:
        kept, packed = pack_tokenizer(tokenizer if tokenizer is not None else name)
    try:
        content = cloudpickle.dumps({"steps": own, "tokenizer": packed})
    except Exception as error:
        raise UsageError(
            f"a step or the tokenizer cannot be sent to the workers: {error}. Functions may not use open files, locks "
            "or connections."
        ) from None
    body: dict[str, Any] = {"content": base64.b64encode(content).decode(), "steps": told}
    if kept is not None:
        body["tokenizer"] = {field: getattr(kept, field) for field in kept.__struct_fields__}
    return body


def source_hash(function: Callable[[Any], Any]) -> str:
    """SHA-256 of a function's text and of the plain values that it uses from outside."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = repr((code.co_code, code.co_names, code.co_consts)) if code is not None else repr(type(function))
    found = inspect.getclosurevars(function) if inspect.isfunction(function) else None
    used = {**found.nonlocals, **found.globals} if found is not None else {}
    plain = sorted((name, repr(value)) for name, value in used.items() if isinstance(value, _PLAIN))
    own = sorted((n, source_hash(v)) for n, v in used.items() if inspect.isfunction(v) and v is not function)
    return hashlib.sha256(repr((text, plain, own, getattr(function, "__defaults__", None))).encode()).hexdigest()
