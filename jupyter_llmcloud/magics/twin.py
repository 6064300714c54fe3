"""The options of a spec as those of a function: in its signature, and explained in its docstring."""

from __future__ import annotations

import inspect
from typing import Any

from jupyter_llmcloud.core.spec import Interface, Spec


def describe(function: Any, spec: type[Spec]) -> None:
    """Give a function the options of its spec."""
    known = inspect.signature(function)
    options = spec.options(Interface.NOTEBOOK)
    keyword = inspect.Parameter.KEYWORD_ONLY
    named = [item for item in known.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    # What has a place of its own keeps it: compress("run", "int8"), explain("run", "text").
    own = [item for item in named if item.kind is not keyword or item.name not in {option.name for option in options}]
    kept = {item.name for item in own}
    added = [
        inspect.Parameter(option.name, keyword, default=option.default) for option in options if option.name not in kept
    ]
    function.__signature__ = known.replace(parameters=[*own, *added])
    lines = [f"    {option.name}: {option.help}" for option in options]
    function.__doc__ = "\n".join([function.__doc__, "", "Options:", *lines])
