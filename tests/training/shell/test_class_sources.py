"""Libraries find the source of what a cell has defined, whichever cell it was."""

from __future__ import annotations

from tests.support.worlds import Ranks

SOURCES = """
import dataclasses, functools, inspect, torch

class Plain:
    "Has no function."
    size = 1

@dataclasses.dataclass
class Settings:
    rate: float = 0.1

class Outer:
    class Inner:
        @property
        def one(self):
            return 1

class Net(torch.nn.Module):
    @functools.lru_cache
    def forward(self, x):
        return x
"""
HEADS = "[inspect.getsource(one).split(':')[0].split()[-1] for one in (Plain, Settings, Outer, Outer.Inner, Net)]"
LINES = "[inspect.getsourcelines(one)[1] for one in (Plain, Outer, Net)]"


def test_the_source_of_a_class_has_the_lines_of_its_cell(world: Ranks) -> None:
    heads = world.ok(SOURCES + HEADS).results()[0]
    assert heads == "['Plain', '@dataclasses.dataclass\\nclass', 'Outer', 'Inner', 'Net(torch.nn.Module)']".replace(
        "'@dataclasses.dataclass\\nclass'", "'Settings'"
    )
    assert world.ok(LINES, source="%%distribute\n" + LINES).results()[0] == "[4, 12, 18]"  # the magic is line 1


def test_a_class_of_an_earlier_cell_is_not_looked_for_in_the_present_one(world: Ranks) -> None:
    world.ok("class Net:\n    def old(self): ...")
    world.ok("Old = Net\n\n\nclass Net:\n    def new(self): ...")
    found = world.ok("import inspect\n'old' in inspect.getsource(Old), 'new' in inspect.getsource(Net)").results()
    assert found == ["(True, True)"] * 2


def test_an_installed_class_is_found_where_it_is(world: Ranks) -> None:
    look = "import inspect, torch\ninspect.getsource(torch.nn.Linear).startswith('class Linear')"
    assert world.ok(look).results() == ["True", "True"]
    made = world.run("import inspect\ninspect.getsource(type('Made', (), {}))")
    assert made.state == "failed"
    assert made.error["ename"] in ("OSError", "TypeError")
