"""A cell before it leaves for the ranks: its lines, its syntax, the names it binds."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.magics import python_api
from jupyter_llmcloud.magics.session import cell as cells
from jupyter_llmcloud.magics.session.cell import (
    Cell,
    CellSyntaxError,
    bound_names,
    check_syntax,
    definitions_of,
    guarded_names,
    is_definition,
    read_cell,
    without_leading_blank_lines,
)

SHELL = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))


class Notebook:
    """A shell in which a whole cell is being executed, as ipykernel tells it."""

    def __init__(self, source: str, number: int = 4) -> None:
        self.parent_header = {"content": {"code": source}}
        self.execution_count = number
        self.history_manager = SimpleNamespace(input_hist_raw=[""] * number + [source])
        self.compile = SHELL.compile
        self.transform_cell = SHELL.transform_cell


def cell_of(source: str) -> Cell:
    """What `%%distribute` makes of a whole cell: IPython hands it its line and the text below."""
    above, _, rest = source.partition("%%distribute")
    line, _, body = rest.partition("\n")
    assert not above.strip() or above.startswith("%%")
    return read_cell(Notebook(source), line.strip(), body)


def notebook_line(source: str, text: str) -> int:
    """The line of the notebook cell in which the ranks will see `text`."""
    cell = cell_of(source)
    [line] = [number for number, line in enumerate(cell.code.splitlines(), 1) if text in line]
    return line + cell.line_offset


@pytest.mark.parametrize(
    "source",
    [
        "%%distribute\nx = 1\nHERE",
        "%%distribute -n 2 --name a\n\n\nx = 1\nHERE",
        "\n\n%%distribute\nHERE",
        "%%distribute\nHERE\n\n\n",
        "%%time\n%%distribute\nx = 1\nHERE",
        "%%distribute\n%%time\nHERE",
        "%%distribute\n   \n\t\n# comment\nHERE",
        "%%distribute\r\nx\r\nHERE",
    ],
)
def test_a_line_keeps_its_number_in_the_notebook(source: str) -> None:
    [expected] = [number for number, line in enumerate(source.splitlines(), 1) if "HERE" in line]
    assert notebook_line(source, "HERE") == expected


def test_the_cell_goes_by_the_notebooks_own_name_for_it() -> None:
    source = "%%distribute\nx = 1"
    assert cell_of(source).filename == SHELL.compile.get_code_name(source, source, 4)
    assert cell_of(source).number == 4


def test_a_shell_that_does_not_know_its_cell_still_gives_lines() -> None:
    cell = read_cell(Notebook("something else"), "-n 2", "x = 1\n")
    assert (cell.source, cell.line_offset) == ("%%distribute -n 2\nx = 1\n", 1)


def test_blank_lines_at_the_top_are_dropped_and_only_those() -> None:
    assert without_leading_blank_lines("\n  \n\n  x\n\ny\n") == "  x\n\ny\n"
    assert without_leading_blank_lines("\n\n") == ""


def complaint(source: str) -> CellSyntaxError:
    with pytest.raises(CellSyntaxError) as caught:
        check_syntax(Notebook(source), cell_of(source))
    return caught.value


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("%%distribute\nx = (1", 2),
        ("%%distribute\n\n\nx = 1\ny = = 2", 5),
        ("%%distribute\nif x:\npass", 3),
        ("%%distribute\nx = 'never closed", 2),
        ("%%distribute\nreturn 1", 2),
        ("%%distribute\nx = 1\n!ls\nbreak", 4),
    ],
)
def test_a_syntax_error_is_told_at_the_notebooks_line(source: str, line: int) -> None:
    error = complaint(source)
    assert error.lineno == line
    assert f"line {line}" in str(error)
    assert "Nothing was started" in str(error)
    assert any(f"line {line}" in row for row in error._render_traceback_())


def test_the_caret_stands_under_the_mistake() -> None:
    drawing = complaint("%%distribute\nif True:\n    y = = 2").drawing
    text, caret = drawing[1:3]
    assert text[caret.index("^")] == "="


@pytest.mark.parametrize(
    "body",
    ["await thing()", "!ls -l", "%time x = 1", "x?", "%%time\nx = 1", "async with a: pass", "", "# only a comment",
     "files = !ls", "x = 1;", "def f():\n    yield 1"],
)  # fmt: skip
def test_what_a_notebook_accepts_is_accepted(body: str) -> None:
    source = f"%%distribute\n{body}"
    check_syntax(Notebook(source), cell_of(source))


@pytest.mark.parametrize("body", ["pwd", "pylab", "x = 1", "x += 1\ny = 2", "!ls", "%who", "x", "x\ny"])
def test_the_tree_of_a_cell_is_that_of_what_the_ranks_execute(body: str) -> None:
    tree = check_syntax(Notebook(body), cell_of(f"%%distribute\n{body}"))
    assert tree is not None and ast.dump(tree) == ast.dump(ast.parse(SHELL.transform_cell(body)))


def names(code: str) -> Any:
    return bound_names(ast.parse(SHELL.transform_cell(code)))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a = 1\nb, (c, *d) = x", {"a", "b", "c", "d"}),
        ("import a.b, c as d\nfrom e import f as g, h", {"a", "d", "g", "h"}),
        ("def f(x): y = 1\nclass C: z = 1", {"f", "C"}),
        ("for i in x:\n  with y as j: pass", {"i", "j"}),
        ("if (n := 3): pass", {"n"}),
        ("def f():\n  global deep\n  deep = 1", {"f", "deep"}),
        ("a += 1\nb: int = 2", {"a", "b"}),
        ("match x:\n  case [a, *b]: pass\n  case {'k': c, **d}: pass\n  case e: pass", {"a", "b", "c", "d", "e"}),
        ("out = !ls", {"out"}),
        ("try:\n  a = 1\nexcept E:\n  b = 1", {"a", "b"}),
        ("g = lambda: (h := 1)", {"g"}),
        ("class C:\n  def m(self):\n    x = 1\n    import y\n    def z(): pass", {"C"}),
    ],
)
def test_the_names_a_cell_may_bind_are_known(code: str, expected: set[str]) -> None:
    assert names(code) == expected


@pytest.mark.parametrize(
    "code", ["from a import *", "exec('x = 1')", "%time x = 1", "def f():\n  globals()['x'] = 1\nf()"]
)
def test_names_that_cannot_be_told_are_not_guessed(code: str) -> None:
    assert names(code) is None


@pytest.mark.parametrize(
    ("code", "name", "can_be_run_again"),
    [
        ('if "model" not in globals():\n    model = make()', "model", True),
        ("if not 'model' in dir():\n    model = make()\n    model.to(device)", "model", True),
        ("try:\n    model\nexcept NameError:\n    model = make()", "model", True),
        ('import torch\nif "model" not in vars():\n    for _ in range(2): model = make()', "model", True),
        ('if "model" not in globals():\n    model = accelerator.prepare(make())', "model", False),
        ('if "model" not in globals():\n    dist.barrier()', "model", False),
        ('if "model" not in globals():\n    model = DDP(make())', "model", False),
        ('if "model" not in globals():\n    model = 1\ntrain(model)', "model", False),
        ('if "model" not in things:\n    model = make()', "", False),
        ("if rank == 0:\n    model = make()", "", False),
        ("try:\n    import torch\nexcept ImportError:\n    torch = None", "", False),
    ],
)
def test_what_is_made_only_where_it_is_missing_can_be_run_again_unless_ranks_make_it_together(
    code: str, name: str, can_be_run_again: bool
) -> None:
    tree = ast.parse(code)
    assert guarded_names(tree) == ({name} if name else set())
    assert is_definition(tree) is can_be_run_again


MIXED = """import torch
import os
from dataclasses import dataclass
@dataclass
class Settings:
    lr: float = 0.1
def make(lr: float = 0.1) -> torch.nn.Module:
    return Net(lr)
class Net(torch.nn.Module):
    pass
def late(x=settings): pass
def changed(): pass
import json; found = json.loads("1")
settings = Settings()
changed = torch.compile(changed)
os = None
for step in range(3):
    def inner(): pass
"""


def test_what_a_cell_defines_beside_a_training_is_had_again_in_its_lines_where_that_can_go_wrong_in_no_way() -> None:
    kept = definitions_of(MIXED).split("\n")
    whole = MIXED.split("\n")
    assert [number for number, line in enumerate(kept) if line] == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert all(line in ("", whole[number]) for number, line in enumerate(kept))


@pytest.mark.parametrize("code", ["x = 1\nx += 1", "%pip list\ndef f(): pass", "def f(a=x): pass\nx = 1"])
def test_a_cell_that_defines_nothing_of_that_kind_is_not_had_again(code: str) -> None:
    assert definitions_of(code) == ""


def test_a_function_in_the_place_of_a_cell_is_refused_with_how_to_call_it() -> None:
    def train() -> None: ...

    with pytest.raises(UsageError, match=r"not a function.*lc\.distribute\('train\(\)', push=\['train'\]\)"):
        python_api._cell(Notebook(""), train)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"lc\.sweep\('train\(\)', push=\['train'\]\)"):
        python_api._cell(Notebook(""), train, "sweep")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"not an int\.$"):
        python_api._cell(Notebook(""), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("char", ["\f", "\u2028", "\x1c"], ids=["form-feed", "line-separator", "file-separator"])
def test_what_ends_no_line_of_python_moves_no_definition(char: str) -> None:
    code = f'text = """one{char}two"""\nprint(text)\n\ndef f():\n    return 1\n'
    assert definitions_of(code) == "\n\n\ndef f():\n    return 1"


@pytest.mark.parametrize(
    ("ename", "evalue", "told"),
    [
        ("NameError", "name 'table' is not defined", "table is a variable of this notebook, and none of the ranks: "),
        ("NameError", "name 'np' is not defined", "np was imported in this notebook, and not on the ranks: import it"),
        ("NameError", "name 'np' is not defined. Did you mean: 'up'?", "np was imported in this notebook"),
        ("NameError", "name 'other' is not defined", None),
        ("NameError", "table", None),
        ("KeyError", "name 'table' is not defined", None),
    ],
    ids=["variable", "module", "with a guess", "of nobody", "another text", "another error"],
)
def test_a_name_that_only_the_notebook_knows_is_told_how_it_comes_to_the_ranks(
    ename: str, evalue: str, told: str | None
) -> None:
    found = cells.name_of_notebook(ename, evalue, {"table": [1], "np": re})
    assert (found == []) if told is None else (len(found) == 1 and found[0].startswith(told))
