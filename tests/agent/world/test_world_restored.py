"""What a rank that replaces a dead one has from its start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from jupyter_llmcloud.errors import WorldError
from tests.support.worlds import Ranks, until


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
    assert note.endswith("Not restored: home, mine.")


def test_what_both_ranks_have_lost_one_after_the_other_is_still_named(new_world: Callable[..., Ranks]) -> None:
    ranks = new_world(2)
    ranks.ok("made = sum([rank, 1])")
    for lost in (1, 0):
        assert ranks.run(f"import os\nif rank == {lost}: os._exit(1)").state == "failed"
        outcome = ranks.ok("pass")
        (note,) = [state.detail for state in outcome.states if state.state == "note"]
        assert note.startswith(f"rank {lost} is a new process") and note.endswith("Not restored: made.")
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
