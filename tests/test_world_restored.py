"""What a rank that replaces a dead one has from its start."""

from __future__ import annotations

from collections.abc import Callable

from tests.worlds import Ranks


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
