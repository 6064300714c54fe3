"""The user's own steps and tokenizer, on their way to the workers that prepare data."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jupyter_llmcloud.core.data.step_names import NAMES, check_step
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets.fingerprints import fingerprint, is_installed
from jupyter_llmcloud.storage.datasets.tokenizer import pack_tokenizer


def pack(steps: Sequence[str | Callable[[Any], Any]], tokenizer: Any, name: str | None) -> dict[str, Any]:
    """Steps and a tokenizer as the body of a request.

    Args:
        tokenizer: an object; None: the one that is called `name`, if any.
    """
    own: dict[str, Any] = {}
    told: list[dict[str, str]] = []
    for step in steps:
        if isinstance(step, str):
            told.append({"name": check_step(step)})
        elif not callable(step):
            raise UsageError(f"steps: {step!r:.60} is neither the name of a step nor a function.")
        else:
            base = getattr(step, "__name__", type(step).__name__)
            free = next(n for n in [base, *(f"{base}-{i}" for i in range(2, 100))] if n not in own and n not in NAMES)
            own[free] = step
            told.append({"name": free, "source_hash": fingerprint(step)})
    kept, packed = None, None
    if tokenizer is not None or name is not None:
        kept, packed = pack_tokenizer(tokenizer if tokenizer is not None else name)
    try:
        content = _pickled({"steps": own, "tokenizer": packed})
    except Exception as error:
        raise UsageError(
            f"a step or the tokenizer cannot be sent to the workers: {error}. Functions may not use open files, locks "
            "or connections."
        ) from None
    body: dict[str, Any] = {"content": base64.b64encode(content).decode(), "steps": told}
    if kept is not None:
        body["tokenizer"] = {field: getattr(kept, field) for field in kept.__struct_fields__}
    return body


def _pickled(value: Any) -> bytes:
    """With what modules of the user define: workers find only what is installed, not what lies beside a notebook."""
    import cloudpickle

    passed_on = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    new = [
        module
        for name, module in [*sys.modules.items()]
        # One that goes by another name of its own, as parts in C may, cannot be registered.
        if isinstance(module, ModuleType) and module.__name__ == name
        if name not in passed_on and not is_installed(name)
    ]
    for module in new:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception:  # such a module has what cannot be sent: a worker may find it where it is
        pass
    finally:
        for module in new:
            cloudpickle.unregister_pickle_by_value(module)
    return bytes(cloudpickle.dumps(value))
