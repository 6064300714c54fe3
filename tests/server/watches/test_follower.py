"""A run that is followed is read on after a disk or a process without free files has refused it for a moment."""

from __future__ import annotations

import asyncio
import errno
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.server.watches import follower as followers
from jupyter_llmcloud.server.watches.follower import RunFollower
from jupyter_llmcloud.storage.runs import RunFolder


class Running:
    async def true_state(self, record: Any) -> str:
        return str(record.state)


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "run-1")
    for rank in (0, 1):
        for path, record in ((folder.metrics(rank), {"values": {"loss": 1.0}, "step": 1}), (folder.logs(rank), {})):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lines({"seq": 1, "t": 1.0, "kind": "stdout", "text": f"rank {rank}\n", **record}))
    record = {"run_id": "run-1", "name": "run", "state": "running", "ranks": [0, 1], "world_size": 2, "created": 1.0}
    (folder.path / "run.json").write_text(json.dumps(record))
    return folder


def refuse_once(monkeypatch: pytest.MonkeyPatch, method: str, named: str) -> None:
    original: Callable[..., Any] = getattr(Path, method)
    refused: list[Path] = []

    def refuses(path: Path, *rest: Any, **more: Any) -> Any:
        if named in str(path) and not refused:
            refused.append(path)
            raise OSError(errno.EMFILE, "Too many open files")
        return original(path, *rest, **more)

    monkeypatch.setattr(Path, method, refuses)


@pytest.mark.parametrize(
    ("method", "named"),
    [("open", "metrics"), ("open", "logs"), ("read_text", "run.json")],
    ids=["metrics", "output", "record"],
)
async def test_what_cannot_be_read_for_a_moment_is_read_then(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, method: str, named: str
) -> None:
    paths = str(folder.metrics(1)), str(folder.logs(1))
    refuse_once(monkeypatch, method, {"metrics": paths[0], "logs": paths[1]}.get(named, named))
    states: Any = Running()
    follower = RunFollower(folder, states)
    follower.listen(lambda: None)
    try:
        async with asyncio.timeout(20):
            while follower.output.num_taken < 2 or (loss := follower.view.metrics.series.get("loss")) is None:
                await asyncio.sleep(0.02)
            while loss.logged_by != {0, 1}:
                await asyncio.sleep(0.02)
        assert follower.is_complete and not follower.is_gone
    finally:
        follower.stop()


class Told:
    """What is found out of a run: each of these in turn, then the last one."""

    def __init__(self, *states: str | Exception) -> None:
        self._states = list(states)

    async def true_state(self, record: Any) -> str:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if isinstance(state, Exception):
            raise state
        return state


async def states_seen(folder: RunFolder, states: Any, until: list[str]) -> list[str]:
    """The states that are shown, one after the other, until these were."""
    seen: list[str] = []
    follower = RunFollower(folder, states)

    def look() -> None:
        if follower.record is not None and seen[-1:] != [follower.view.state]:
            seen.append(follower.view.state)

    follower.listen(look)
    try:
        async with asyncio.timeout(20):
            while seen != until:
                await asyncio.sleep(0.02)
    finally:
        follower.stop()
    return seen


async def test_a_run_whose_agent_is_heard_again_is_shown_as_running_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says so all the time: it stayed "lost" to its end, without a Stop, for whoever watched it."""
    monkeypatch.setattr(followers, "STATES_S", 0.02)
    monkeypatch.setattr(followers, "ENDED_EVERY_S", 0.05)
    await states_seen(folder, Told("running", "lost", "running"), ["running", "lost", "running"])


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), sqlite3.OperationalError("is locked")],
    ids=["files", "database"],
)
async def test_a_run_is_followed_on_after_its_state_could_not_be_found_out(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(followers, "STATES_S", 0.02)
    await states_seen(folder, Told(error, "lost"), ["running", "lost"])
