"""What a run is executed with, as far as results depend on it: kept in its record, so that runs can be compared."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = (
    "jupyter-llmcloud",
    "torch",
    "accelerate",
    "transformers",
    "safetensors",
    "numpy",
    "datasets",
    "peft",
    "trl",
    "lightning",
    "pytorch-lightning",
    "torchvision",
)


@cache
def library_versions() -> dict[str, str]:
    """The version of Python and of each library that is installed; takes some milliseconds, once."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
