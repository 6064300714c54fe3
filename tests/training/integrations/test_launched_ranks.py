"""Ranks look to every library like processes that torchrun has started, and nothing looks like a notebook."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jupyter_llmcloud.protocol.agent_messages import ResizeWorld
from tests.support.worlds import Ranks

LAUNCHER = "('RANK', 'WORLD_SIZE', 'MASTER_', 'ROLE_', 'TORCHELASTIC_')"
TELL = f"""
import os
environment = {{name: value for name, value in os.environ.items() if any(part in name for part in {LAUNCHER})}}
"""
ALIKE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
         "ROLE_NAME", "ROLE_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"}  # fmt: skip


def test_the_environment_of_a_rank_is_that_of_torchrun(world: Ranks, tmp_path: Path) -> None:
    script = tmp_path / "told.py"
    script.write_text(
        f"import json{TELL}open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(json.dumps(environment))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    world.ok(TELL)
    for rank in (0, 1):
        wanted: dict[str, str] = json.loads((tmp_path / str(rank)).read_text())
        found = world.pull("environment", rank)
        own = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"}  # how torchrun speaks with its processes
        assert set(wanted) - set(found) <= own
        assert {name: found[name] for name in ALIKE} == {name: wanted[name] for name in ALIKE}
        assert found["TORCHELASTIC_RUN_ID"]


def test_libraries_find_launched_processes_and_no_notebook(world: Ranks) -> None:
    outcome = world.ok(
        """
        import sys
        import torch
        from rich.console import Console
        from tqdm.autonotebook import tqdm
        from transformers.utils import is_in_notebook
        print(hasattr(sys, "ps1"), bool(sys.flags.interactive), is_in_notebook(), Console().is_jupyter)
        print(torch.distributed.is_torchelastic_launched(), tqdm.__module__.startswith("tqdm.notebook"))
        """
    )
    assert outcome.text(0).splitlines() == ["False False False False", "True False"]


def test_after_a_resize_every_rank_knows_its_place_among_the_others(new_world: Callable[..., Ranks]) -> None:
    world = new_world(2)

    def told(name: str) -> list[str]:
        world.ok(TELL)
        return [world.pull("environment", rank)[name] for rank in range(world.size)]

    def resize(size: int) -> None:
        world.channel.request(ResizeWorld(world_id=world.world_id, num_ranks=size), 60)
        world.size = size

    resize(3)
    assert told("WORLD_SIZE") == told("ROLE_WORLD_SIZE") == ["3", "3", "3"]
    assert (told("LOCAL_WORLD_SIZE"), told("LOCAL_RANK")) == (["2", "2", "1"], ["0", "1", "0"])
    assert (told("GROUP_RANK"), told("GROUP_WORLD_SIZE")) == (["0", "0", "1"], ["2", "2", "2"])
    resize(1)
    assert (told("LOCAL_WORLD_SIZE"), told("WORLD_SIZE"), told("GROUP_WORLD_SIZE")) == (["1"], ["1"], ["1"])


def test_every_replaced_function_looks_like_the_one_it_replaces(world: Ranks) -> None:
    world.ok(
        """
        import inspect
        from jupyter_llmcloud.system import patching

        def looks(function, has_module):
            try:
                signature = str(inspect.signature(function))
            except (TypeError, ValueError):
                signature = ""
            module = function.__module__ if has_module else ""
            return [function.__name__, function.__qualname__, module, function.__doc__, signature]

        unlike = {}
        for target in patching.applied():
            now, original = patching._get(target), patching._applied[target].original(target)
            both = [looks(one, hasattr(original, "__module__")) for one in (now, original) if inspect.isroutine(one)]
            if len(both) == 2 and both[0] != both[1]:  # methods of C have no module
                unlike[target] = both
        full = {cls.__name__: inspect.getfullargspec(cls.__init__).args[1:3]
                for cls in (__import__("torch").utils.data.DataLoader, __import__("accelerate").Accelerator)}
        """,
        checkpoint_every=2,
    )
    unlike: dict[str, Any] = world.pull("unlike")
    assert unlike == {}
    assert world.pull("full") == {
        "DataLoader": ["dataset", "batch_size"],
        "Accelerator": ["device_placement", "split_batches"],
    }
