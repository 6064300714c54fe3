"""Ranks that did not go on are started again: the run hangs no more. By values, without ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyter_llmcloud.agent.runs.run_feed import RunFeed
from jupyter_llmcloud.storage.journal import read_all
from jupyter_llmcloud.storage.runs import RunFolder, RunRecord


async def hung(folder: RunFolder, late: list[int], ranks: list[int]) -> RunFeed:
    """A run whose first attempt does not go on."""
    folder.path.mkdir(parents=True)
    feed = RunFeed(RunRecord("r-1", "r", "running", ranks=ranks, world_size=len(ranks)), folder, "")
    feed.begin(at_once=True)
    feed.begin_attempt(1, ranks)
    report: dict[str, Any] = {"kind": "report", "text": "rank 1 is late.\n", "late": late, "waiting": [0]}
    feed.journal("logs", late[0], [report])
    assert folder.read().hang["late"] == late
    return feed


async def test_an_attempt_that_begins_ends_the_hang_of_the_one_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r-1")
    feed = await hung(folder, [1], [0, 1])
    feed.begin_attempt(2, [0, 1])
    assert folder.read().hang == {}
    last = list(read_all(folder.logs(1)))[-1]
    assert (last["recovered"], last["text"]) == (True, "rank 1 begins again.\n")


async def test_so_it_does_where_the_late_rank_is_none_any_more(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r-1")
    feed = await hung(folder, [1], [0, 1])
    feed.begin_attempt(2, [0])
    assert folder.read().hang == {}
    assert list(read_all(folder.logs(0)))[-1]["recovered"] is True
