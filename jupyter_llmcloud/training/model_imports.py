"""Imports transformers' models, also where a package that they use when it is there cannot be imported.

A torchvision that was built for another torch is the usual case: `import torchvision` fails, and with it every model of
transformers, although hardly one of them needs it. Cells that need nothing of it shall run.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable

from jupyter_llmcloud.system import patching

# What transformers imports on the way to any model when it finds it.
_OPTIONAL = ("torchvision", "torchaudio", "flash_attn", "deepspeed", "bitsandbytes", "sklearn", "scipy", "PIL")


def import_models() -> None:
    """Import what ranks use; model classes are what takes the time."""
    try:
        _import()
    except Exception:
        broken = {name: problem for name in _OPTIONAL if (problem := _problem_with(name))}
        if not broken:
            raise
        import_without(broken)
        for name, problem in broken.items():
            patching.add_notice(
                f"{name} is here and cannot be imported ({problem}): transformers does without it. Install the build "
                f"that fits torch {sys.modules['torch'].__version__}, or uninstall it."
            )


def _import() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401


def _problem_with(name: str) -> str:
    """Why a package that is installed cannot be imported; "" when it can, and when it is not installed."""
    if importlib.util.find_spec(name) is None:
        return ""
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return ""


def import_without(names: Iterable[str]) -> None:
    """Import the models anew as if these packages were not installed; they are found again afterwards."""
    hidden = set(names)
    for module in [name for name in sys.modules if name.partition(".")[0] in ("transformers", *hidden)]:
        del sys.modules[module]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # which says that there is no such module
    try:
        _import()
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
