"""Modules of the user's own are compiled like cells: with their loops followed."""

from __future__ import annotations

import ast
import functools
from importlib.machinery import SourceFileLoader
from types import CodeType
from typing import Any

from jupyter_llmcloud.training.resume.loop_tracking import LoopInstrumenter
from jupyter_llmcloud.training.resume.user_code import is_own_file


def install() -> None:
    """Compile own modules that are imported from now on. Called once, in a rank."""
    original = SourceFileLoader.get_code

    @functools.wraps(original)
    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        if not is_own_file(path):
            return original(self, fullname)
        try:
            tree = LoopInstrumenter().visit(ast.parse(self.get_data(path), path))
        except (SyntaxError, ValueError, OSError):
            return original(self, fullname)  # which says what is wrong with it
        # Nothing is written to __pycache__, where other programs would find it.
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code

    loader: Any = SourceFileLoader
    loader.get_code = get_code
