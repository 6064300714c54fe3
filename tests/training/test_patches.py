"""What a rank replaces of other packages: what stands in the catalogue, while it is needed, and nothing that leaves."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.training import patches
from tests.support.resuming import FUNCTIONS, cell, results, resumed, same
from tests.support.worlds import AgentProcess, Outcome, Ranks

TRACKED: dict[str, Any] = {"checkpoint_every": 2, "max_restarts": 1}
# transformers' Trainer, which every rank has, imports peft where it is installed.
ABSENT = [patch for patch in patches.ON_IMPORT if patch is not patches.ADAPTER_PLANS]
PRESENT = [patch for patch in patches.CATALOGUE if patch not in ABSENT]
ALWAYS = {target for patch in PRESENT if patch not in patches.WHILE_TRACKED for target in patch.targets}
FOUND = """
import inspect, sys, types
from jupyter_llmcloud.system import patching

def ours(value):
    return type(value) is types.FunctionType and "/jupyter_llmcloud/" in value.__code__.co_filename

found = set()
for name, module in list(sys.modules.items()):
    if name.startswith(("jupyter_llmcloud", "__main__", "__mp_main__")) or name in patching.applied():
        continue
    if not isinstance(module, types.ModuleType):
        continue
    for key, value in list(vars(module).items()):
        if ours(value):
            found.add(f"{name}:{key}")
        elif isinstance(value, type) and value.__module__ == name:
            found |= {f"{name}:{key}.{part}" for part, inner in list(vars(value).items()) if ours(inner)}
known = set(patching.applied())
same = {id(patching._get(target)) for target in known if ":" in target}
unknown = sorted(target for target in found if id(patching._get(target)) not in same and "__llmcloud" not in target)
known = sorted(known)
"""


def told(outcome: Outcome) -> str:
    return "".join(record["text"] for _, record in outcome.logs if record.get("warning"))


@pytest.mark.parametrize("options", [{}, TRACKED], ids=["plain", "tracked"])
def test_a_rank_has_replaced_what_the_catalogue_says_and_nothing_else(world: Ranks, options: dict[str, Any]) -> None:
    world.ok(FOUND, **options)
    assert world.pull("unknown") == []
    while_tracked = {target for patch in patches.WHILE_TRACKED for target in patch.targets}
    assert set(world.pull("known")) == (ALWAYS | while_tracked if options else ALWAYS)


def test_replaced_functions_keep_name_signature_and_documentation(world: Ranks) -> None:
    world.ok(
        """
        import inspect
        import accelerate, torch
        from torch.utils.data import DataLoader
        looks = [(f.__name__, f.__module__, bool(f.__doc__), list(inspect.signature(f).parameters)[:3])
                 for f in (DataLoader.__init__, torch.autograd.backward, accelerate.notebook_launcher, torch.distributed.new_group)]
        full = inspect.getfullargspec(DataLoader.__init__).args[:3]
        """,
        **TRACKED,
    )
    assert world.pull("full") == ["self", "dataset", "batch_size"]
    assert world.pull("looks") == [
        ("__init__", "torch.utils.data.dataloader", False, ["self", "dataset", "batch_size"]),
        ("backward", "torch.autograd", True, ["tensors", "grad_tensors", "retain_graph"]),
        ("notebook_launcher", "accelerate.launchers", True, ["function", "args", "num_processes"]),
        ("new_group", "torch.distributed.distributed_c10d", True, ["ranks", "timeout", "backend"]),
    ]


FUNCTION = """
def early(items):
    total = 0
    for item in items:
        for part in [item]:
            total += part
    return total
"""


def test_functions_that_leave_the_rank_carry_nothing_of_ours(world: Ranks, tmp_path: Path) -> None:
    (tmp_path / "of_the_user.py").write_text("def helper(n):\n    for i in range(n):\n        yield i\n")
    world.ok(FUNCTION)
    world.ok(
        f"""
        import cloudpickle, inspect, pickle, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import of_the_user

        def late(items):
            return [early([item]) for item in items] + [x for x in map(lambda y: sum(1 for _ in range(y)), items)]

        class Holder:
            def sum(self, items):
                for item in items:
                    self.last = item
                return self.last

        def names(function):
            codes = [function.__code__]
            for code in codes:
                codes += [c for c in code.co_consts if hasattr(c, "co_names")]
            return {{name for code in codes for name in code.co_names}}

        during = names(early)  # tracked while this cell runs
        sent = [cloudpickle.dumps(f) for f in (early, Holder, of_the_user.helper)]
        source = inspect.getsource(early)
        inside = names(of_the_user.helper)
        """,
        **TRACKED,
    )
    assert "__llmcloud_loop__" in world.pull("during") & world.pull("inside")
    assert all(b"__llmcloud" not in data for data in world.pull("sent"))
    assert world.pull("source") == FUNCTION.lstrip()
    early, late = world.pull("early"), world.pull("late")
    assert (early([1, 2, 3]), late([1, 2])) == (6, [1, 2, 1, 2])
    world.ok(
        "after = [names(f) for f in (early, late, Holder.sum, of_the_user.helper)]\nloader = type(of_the_user.__loader__).__name__"
    )
    assert all("__llmcloud_loop__" not in names for names in world.pull("after"))
    assert world.pull("loader") == "SourceFileLoader"


def test_in_an_ordinary_cell_nothing_is_instrumented(world: Ranks) -> None:
    world.ok("import dis\n" + FUNCTION + "\ncode = dis.Bytecode(early).dis()")
    assert "llmcloud" not in world.pull("code")


def test_a_future_statement_of_a_cell_holds_when_it_is_compiled_again(world: Ranks) -> None:
    world.ok(
        "from __future__ import annotations\ndef typed(items: NoSuchType):\n    for item in items:\n        last = item\n    return last"
    )
    world.ok("result = (typed([1, 2]), typed.__annotations__)", **TRACKED)
    assert world.pull("result") == (2, {"items": "NoSuchType"})


def test_torch_compile_sees_no_loop_of_ours(world: Ranks) -> None:
    world.ok(
        """
        import torch
        def power(x, n: int):
            for _ in range(n):
                x = x * 2
            return x
        """
    )
    world.ok("result = torch.compile(power, fullgraph=True, backend='eager')(torch.ones(2), 3).tolist()", **TRACKED)
    assert world.pull("result") == [8.0, 8.0]
    world.ok(
        """
        def inner(x):
            for i in (1, 2):
                x = x + i
            return x
        result = torch.compile(inner, fullgraph=True, backend="eager")(torch.ones(2)).tolist()
        """,
        **TRACKED,
    )
    assert world.pull("result") == [4.0, 4.0]


def test_functions_of_earlier_cells_are_followed_in_a_run_that_is_resumed(
    new_world: Callable[..., Ranks],
) -> None:
    definitions, _, call = FUNCTIONS.rpartition("main()")
    wanted, world = new_world(), new_world()
    wanted.ok(cell(FUNCTIONS))
    world.ok(cell(definitions, 29), is_definition=True)
    outcome = world.ok("set_seed(7)\nmain()" + call, checkpoint_every=4, max_restarts=3)
    [note] = resumed(outcome)
    assert "resumed from step" in note
    for one, other in zip(results(wanted), results(world), strict=True):
        assert same(one, other)


# --- versions that are not as expected -------------------------------------------------------------------------------

TAMPER = """
import importlib.abc, importlib.machinery, sys

def rename(original):
    def method(self, *renamed, **more):
        return original(self, *renamed, **more)
    return method

class Tamper(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in TARGETS:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            for cls, method in TARGETS[name]:
                original = getattr(getattr(module, cls), method)
                setattr(getattr(module, cls), method, rename(original))
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Tamper())
"""


@pytest.fixture
def tampered(tmp_path: Path) -> Iterator[Callable[[dict[str, list[tuple[str, str]]]], Ranks]]:
    """Makes worlds whose libraries have methods with other signatures."""
    agents: list[AgentProcess] = []

    def make(targets: dict[str, list[tuple[str, str]]]) -> Ranks:
        (tmp_path / "sitecustomize.py").write_text(f"TARGETS = {targets!r}\n{TAMPER}")
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
        agents.append(AgentProcess(2, env={"PYTHONPATH": path}))
        return Ranks(agents[-1])

    yield make
    for agent in agents:
        agent.end()


@pytest.mark.story
def test_a_trainer_with_another_signature_trains_and_the_run_says_what_is_off(
    tampered: Callable[[dict[str, list[tuple[str, str]]]], Ranks],
) -> None:
    world = tampered({"transformers.trainer": [("Trainer", "_run_epoch")]})
    outcome = world.ok(cell("trainer"), checkpoint_every=4)
    assert (
        "Resume inside Trainer.train() is off: transformers.trainer.Trainer._run_epoch takes (renamed, more)"
        in told(outcome)
    )
    assert world.pull("result")["weights"]
    assert "Traceback" not in outcome.text(kind="stderr")


@pytest.mark.story
def test_a_loader_with_another_signature_trains_without_checkpoints_and_the_run_says_so(
    tampered: Callable[[dict[str, list[tuple[str, str]]]], Ranks],
) -> None:
    world = tampered({"torch.utils.data.dataloader": [("DataLoader", "__init__")]})
    outcome = world.ok(cell("accelerate"), **TRACKED)
    assert "Resume of a cell is off: torch.utils.data.DataLoader.__init__ takes (renamed, more)" in told(outcome)
    assert world.pull("result")["weights"]
    assert not (outcome.folder.path / "checkpoints").exists()
    refused = world.run(cell("accelerate"), resume={"folder": "/nowhere"})
    assert refused.state == "failed"
    assert "Resume of a cell is off" in refused.error["evalue"]


def test_the_catalogue_says_why_and_what_to_expect_for_every_patch() -> None:
    for patch in patches.CATALOGUE:
        assert patch.why and patch.checked and patch.targets
        assert patch.without.endswith("."), patch.feature
    for patch in PRESENT:  # the others in tests/compat, where their libraries are loaded
        assert patch.problem() is None, textwrap.shorten(str(patch.problem()), 500)
