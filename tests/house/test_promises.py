"""Every promise and every complaint has a test that is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.promises import COMPLAINTS, PROMISES

TESTS = {path.stem: path for path in Path(__file__).parents[1].rglob("*.py")}
ROWS = {f"{row}: {detail}": names for row, details in PROMISES.items() for detail, names in details.items()}


@pytest.mark.parametrize("names", [*ROWS.values(), *COMPLAINTS.values()], ids=[*ROWS, *COMPLAINTS])
def test_a_promise_is_shown_by_tests(names: list[str]) -> None:
    assert names
    for name in names:
        module, _, function = name.partition("::")
        tree = ast.parse(TESTS[module].read_text(encoding="utf-8"))
        known = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in known, name
