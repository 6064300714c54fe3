"""Cells that are plain Python, as most are: IPython need not look at each token to leave them as they are."""

from __future__ import annotations

import ast
import re

# What IPython takes away at the front of lines although Python reads it: prompts that were copied, an indentation.
_FRONT = re.compile(r"\A\s|>>>|\]: |\.\.\.: ")


def read_plain(code: str) -> ast.Module | None:
    """The tree of code that means to Python what it means to IPython; None of other code, and of what is no code.

    A single line may be a magic without its sign all the same (`pwd`): that is for who has magics to find out.
    """
    if _FRONT.search(code):
        return None
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError):
        return None
