"""What ranks that are new processes are given again, by values: definition cells and what was pushed, in their order."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_llmcloud.agent.world import replay_cells
from jupyter_llmcloud.agent.world.replay_cells import ReplayCells
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.agent_messages import Execute, NamesFound, Push


def cell(code: str, **about: Any) -> Execute:
    return Execute(world_id="w", run_id="r", name="cell", code=code, **about)


def push(size: int = 1, **texts: str) -> Push:
    return Push(world_id="w", texts=texts, payload=bytes(size))


def restored(cells: ReplayCells, refuses: str = "") -> tuple[list[str], list[str]]:
    """What rank 1 was asked, in order, and the notes."""
    asked: list[str] = []

    async def ask(rank: int, request: Any) -> Any:
        if not isinstance(request, Execute | Push):
            return NamesFound(missing=[], own=[], imported=[])
        asked.append(request.code if isinstance(request, Execute) else ",".join(request.texts))
        assert (rank, request.ranks) == (1, [1])
        if asked[-1] == refuses:
            raise UsageError("cannot be loaded")

    cells._ask = ask
    notes, stuck = asyncio.run(cells.restore([1], [0, 1]))
    assert stuck == []
    return asked, notes


def made(*given: Execute | Push) -> ReplayCells:
    cells = ReplayCells("w", None)  # type: ignore[arg-type]
    for item in given:
        cells.note_push(item) if isinstance(item, Push) else cells.note(item)
    return cells


def test_cells_and_what_was_pushed_come_in_their_order() -> None:
    asked, notes = restored(made(cell("one", is_definition=True), push(a="1"), cell("two", is_definition=True)))
    assert asked == ["one", "a", "two"]
    assert notes == [
        "rank 1 is a new process; 2 definition cells were run on it again, and what was pushed is there."
        " Nothing is missing."
    ]


def test_of_a_cell_that_trains_only_what_it_defines_is_run_again_once() -> None:
    trains = cell("def f(): pass\ntrain(f)", definitions="def f(): pass")
    assert restored(made(trains, trains, cell("train()")))[0] == ["def f(): pass"]


def test_what_was_pushed_under_the_same_names_later_counts() -> None:
    assert restored(made(push(a="1", b="2"), push(c=""), push(a="3", b="", d="")))[0] == ["c", "a,b,d"]


def test_what_cannot_be_loaded_does_not_keep_the_rest_away() -> None:
    assert restored(made(push(a="1"), cell("one", is_definition=True)), refuses="a")[0] == ["a", "one"]


def test_no_more_is_kept_than_fits_the_oldest_is_not(monkeypatch: Any) -> None:
    monkeypatch.setattr(replay_cells, "MAX_PUSHED", 10)
    assert restored(made(push(6, a=""), push(11, b=""), push(4, c=""), push(5, d="")))[0] == ["c", "d"]
