"""Which variables of a cell are looked at, told by the functions that mention them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from jupyter_llmcloud.training.object_graph.graph import MUST
from jupyter_llmcloud.training.object_graph.liveness import may_be_read_by_body
from jupyter_llmcloud.training.resume.cell import objects
from jupyter_llmcloud.training.resume.cell.objects import CellObjects, Scope

DEFINED = "import functools, torch\nbank = torch.zeros(50_000)\n"
FUNCTIONS = {
    "plain": "def use(): bank[0] += 1",
    "decorated": "@torch.no_grad()\ndef use(): bank[0] += 1",
    "cached": "@functools.lru_cache\ndef use(): bank[0] += 1",
    "partial": "use = functools.partial(lambda n: bank, 3)",
    "static method": "class Use:\n    @staticmethod\n    def go(): bank[0] += 1",
    "property": "class Use:\n    @property\n    def go(self): return bank",
    "bound method": "class Use:\n    def go(self): return bank\nuse = Use().go\ndel Use",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_function_of_an_earlier_cell_mentions_must_be_saved_however_it_is_wrapped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "own_modules", dict[str, Any]().items)  # those of other tests are in this process
    namespace: dict[str, Any] = {"__name__": "__main__", "sys": sys}
    exec(DEFINED + FUNCTIONS[name], namespace)
    exec("frame = sys._getframe()", namespace)
    scope = Scope(frames=[namespace.pop("frame")], given={"sys"})
    graph = CellObjects().graph(scope)
    assert graph.entry_of(namespace["bank"]).need == MUST


class _Asked:
    def __iter__(self) -> Iterator[int]:
        self.names = may_be_read_by_body(sys._getframe(1))
        return iter([1])


@pytest.mark.parametrize("loop", ["for epoch in asked", "for epoch, _ in zip(asked, asked)"], ids=["for", "zip"])
def test_what_rounds_of_a_loop_hand_on_is_what_its_body_reads_first(loop: str) -> None:
    asked = _Asked()
    body = "    own = rows + epoch\n    rows = own + 1\n    total += own"
    exec(f"own = rows = total = 0\n{loop}:\n{body}\nown", {"asked": asked})
    assert asked.names & {"own", "rows", "total"} == {"rows", "total"}
