"""Cells that are plain Python are those that IPython leaves as they are."""

from __future__ import annotations

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from jupyter_llmcloud.core.plain_cells import read_plain

PLAIN = {
    "pass": "pass",
    "two-lines": "x = 1\ny = x % 2",
    "await": "await thing()",
    "last-expression": "x = 3\nx;",
    "question-in-text": "print('why?')  # really?\n'?'",
    "magic-in-text": 'doc = """\n%time x\n!ls\n?x\n"""\nx = (5\n%2)',
    "magic-in-f-string": "x = 3\nprint(f'{x=!r}', f\"{x % 2}\")",
    "decorator": "@cached\ndef f(a, /, *, b):\n    return a",
    "no-end": "if x:\n    y = 1\n    # end",
    "windows-lines": "x = 1\r\nif x:\r\n    y = 2\r\n",
    "matrix": "y = a @ b\nz = ~a != b",
}
OTHER = {
    "magic": "%time x = 1",
    "cell-magic": "%%time\nx = 1",
    "shell": "x = 1\n!ls -l",
    "assigned": "files = !ls",
    "help": "x?",
    "indented": "  x = 1\n  y = 2",
    "blank-lines": "\n\nx = 1",
    "prompts": ">>> x = 1\n>>> y = 2",
    "numbered-prompt": "In [1]: x = 1",  # which Python reads as an annotation
    "prompt-in-text": 'doc = """\n>>> x = 1\n"""',  # for IPython to decide, whose versions differ
    "wrong": "x = (1",
    "null": "x = '\0'",
}


@pytest.mark.parametrize("code", PLAIN.values(), ids=PLAIN)
def test_ipython_leaves_plain_python_as_it_is(code: str) -> None:
    assert read_plain(code) is not None
    assert TransformerManager().transform_cell(code) == (code if code.endswith("\n") else code + "\n")


@pytest.mark.parametrize("code", OTHER.values(), ids=OTHER)
def test_other_code_is_for_ipython(code: str) -> None:
    assert read_plain(code) is None
