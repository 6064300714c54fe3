"""What a rank that replaces a dead one has from its start."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from jupyter_llmcloud.errors import WorldError
from jupyter_llmcloud.protocol.agent_messages import ResizeWorld
from tests.support.worlds import AgentProcess, Outcome, Ranks, until


def test_what_was_imported_in_any_cell_is_there_on_a_rank_that_is_new(new_world: Callable[..., Ranks]) -> None:
    ranks = new_world(2)
    ranks.ok(
        """
        import collections, os.path as ways, signal
        from pathlib import Path
        from textwrap import dedent as plain
        home = Path("/").resolve()
        def mine(): return 1
        """
    )
    assert ranks.run("import os\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)").state == "failed"
    outcome = ranks.ok("print(collections.Counter('a'), ways.join('a', 'b'), Path('x'), plain(' y'), os.sep)")
    assert outcome.text(0) == outcome.text(1) == "Counter({'a': 1}) a/b x y /\n"
    (note,) = [state.detail for state in outcome.states if state.state == "note"]
    assert note.endswith("Not restored: 2 variables (home, mine).")


def test_what_both_ranks_have_lost_one_after_the_other_is_still_named(new_world: Callable[..., Ranks]) -> None:
    ranks = new_world(2)
    ranks.ok("made = sum([rank, 1])")
    for lost in (1, 0):
        assert ranks.run(f"import os\nif rank == {lost}: os._exit(1)").state == "failed"
        outcome = ranks.ok("pass")
        (note,) = [state.detail for state in outcome.states if state.state == "note"]
        assert note.startswith(f"rank {lost} is a new process") and note.endswith("Not restored: 1 variable (made).")
    assert ranks.run("import os\nos._exit(1)").state == "failed"
    notes = [state.detail for state in ranks.ok("pass").states if state.state == "note"]
    assert len(notes) == 1 and notes[0].startswith("ranks 0-1 are new") and "no rank is left that has it" in notes[0]


def test_a_rank_that_dies_while_others_wait_for_it_to_join_is_named_at_once_and_they_keep_their_variables(
    new_world: Callable[..., Ranks],
) -> None:
    ranks = new_world(3)
    ranks.ok("kept = rank")
    pids, beside = ranks.pids(), ranks.beside()
    assert ranks.run("import os\nif rank == 2: os._exit(1)").state == "failed"
    os.kill(pids[0], signal.SIGSTOP)
    before = beside.describe()["generation"]
    running = ranks.send("kept")
    until(lambda: beside.describe()["generation"] > before, "the others wait for rank 0")
    os.kill(pids[0], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorldError, match="rank 0 could not join"):
        running.end(60)
    assert time.monotonic() - began < 8
    assert ranks.ok("globals().get('kept', 'new')").results() == ["'new'", "1", "'new'"]


def test_what_the_cell_makes_again_is_not_missed_and_the_rest_is_one_line_with_a_count(
    new_world: Callable[..., Ranks],
) -> None:
    ranks = new_world(4)
    names = [f"v{number:02d}" for number in range(12)]
    ranks.ok("\n".join(f"{name} = sum([1])" for name in names), makes=names, execution_count=5)
    dying = "import os\nif rank in (1, 2): os._exit(1)"
    assert ranks.run(dying).state == "failed"
    [note] = notes(ranks.ok("pass", makes=names[:2]))
    assert note.startswith("ranks 1-2 are new processes")
    listed = ", ".join(names[2:10])
    assert note.endswith(f"Not restored: 10 variables ({listed} and 2 more). Made by In [5].")
    assert ranks.run(dying).state == "failed"
    [note] = notes(ranks.ok("pass", makes=names))
    assert "Not restored" not in note and "Nothing is missing" not in note


def notes(outcome: Outcome) -> list[str]:
    return [state.detail for state in outcome.states if state.state == "note"]


GUARDED = """
import torch
if "model" not in globals():
    model = torch.nn.Linear(3, 1)
"""


def test_ranks_that_a_resize_adds_have_what_a_definition_makes_where_it_is_missing(
    new_world: Callable[..., Ranks],
) -> None:
    ranks = new_world(2)
    ranks.ok(GUARDED, is_definition=True, makes=["torch", "model"])
    ranks.ok("model.bias.data.fill_(7); other = [rank]", makes=["other"], execution_count=3)
    resized = ranks.channel.request(resize(ranks, 4), 60)
    [note] = resized.notes
    assert note.startswith("ranks 2-3 are new processes; 1 definition cells were run on them again.")
    assert note.endswith("Not restored: 1 variable (other). Made by In [3].")
    assert notes(ranks.ok(GUARDED)) == []  # it was said at the resize
    assert ranks.ok("float(model.bias) == 7").results() == ["True", "True", "False", "False"]


def resize(ranks: Ranks, num_ranks: int) -> ResizeWorld:
    return ResizeWorld(
        world_id=ranks.world_id,
        num_ranks=num_ranks,
        agents=[{"address": ranks.agent.address, "home": ranks.agent.address, "num_ranks": num_ranks - ranks.size}],
    )


def test_a_definition_that_waits_for_other_ranks_does_not_hold_up_a_resize(hasty: AgentProcess) -> None:
    ranks = Ranks(hasty, 2)
    waits = "import torch.distributed as dist\nif 'm' not in globals():\n    dist.barrier()\n    m = 1"
    ranks.ok(waits, is_definition=True, makes=["dist", "m"])
    resized = ranks.channel.request(resize(ranks, 3), 60)
    assert "did not end there" in resized.notes[0]
    assert ranks.ok("globals().get('m', 0)").results() == ["1", "1", "0"]
    summed = ranks.ok("import torch\nt = torch.ones(1)\ntorch.distributed.all_reduce(t)\nint(t)")
    assert summed.results() == ["3"] * 3


@pytest.fixture
def hasty() -> Iterator[AgentProcess]:
    """An agent that waits two seconds for a definition cell."""
    code = (
        "import runpy, sys; from jupyter_llmcloud.agent.world import replay_cells; replay_cells.REPLAY_TIMEOUT_S = 2.0; "
        "sys.argv = ['agent', *sys.argv[4:]]; runpy.run_module('jupyter_llmcloud.agent', run_name='__main__')"
    )
    agent = AgentProcess(prefix=[sys.executable, "-c", code])
    yield agent
    agent.end()
