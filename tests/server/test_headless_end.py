"""When a headless server ends after its owner, and what a server does about a start that has failed."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.server.context import ServerContext
from jupyter_llmcloud.server.headless import app as headless


class StoppedApp:
    """In place of the server: whether it was stopped."""

    log = logging.getLogger("test")
    is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each look at the runs says of them, the first one first; an exception is raised."""
    told: list[Any] = []

    async def look(_: Any) -> bool:
        said = told.pop(0)
        if isinstance(said, Exception):
            raise said
        return bool(said)

    async def gone(*_: Any) -> None:
        return

    monkeypatch.setattr(headless, "POLL_S", 0.0)
    monkeypatch.setattr(headless, "context_of", lambda app: app)
    monkeypatch.setattr(headless, "has_active_runs", look)
    monkeypatch.setattr(headless, "owner_gone", gone)
    monkeypatch.setenv("LLMCLOUD_LEASE_S", "0")
    return told


async def test_a_look_at_the_runs_that_fails_does_not_end_what_trains(looks: list[Any]) -> None:
    """The server ended with its clusters, and the run on them."""
    refused = OSError(errno.EMFILE, "Too many open files")
    looks += [True, refused, NotFound("there is no run 'a'."), sqlite3.OperationalError("is locked"), True, False]
    app: Any = StoppedApp()
    await headless.end_with_owner(app, 1, 1.0)
    assert app.is_stopped and not looks, "it goes on until no run does"


async def test_a_server_whose_looks_all_fail_does_not_stay_for_ever(looks: list[Any]) -> None:
    looks += [OSError(errno.EIO, "Input/output error")] * headless.UNKNOWN_TRIES
    app: Any = StoppedApp()
    await headless.end_with_owner(app, 1, 1.0)
    assert app.is_stopped


async def test_a_start_that_has_failed_is_tried_again_with_the_next_request(
    own_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that was locked at the start: every request to an endpoint was an error until the server ended."""
    context = ServerContext(logging.getLogger("test"))
    register, calls = context.state.register_server, list[str]()

    def locked_once(*about: Any, **more: Any) -> None:
        calls.append("")
        if len(calls) == 1:
            raise sqlite3.OperationalError("database is locked")
        register(*about, **more)

    monkeypatch.setattr(context.state, "register_server", locked_once)
    with pytest.raises(sqlite3.OperationalError):
        await context.started()
    await asyncio.gather(context.started(), context.started())
    assert len(calls) == 2
    assert [row["id"] for row in context.state.servers()] == [context.server_id]
    await context.close()
