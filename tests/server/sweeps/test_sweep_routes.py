"""Sweeps over REST: what is refused before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.errors import CapacityError
from jupyter_llmcloud.storage.search.study import absolute_storage
from tests.support.server_parts import Server, until

pytest.importorskip("optuna")
pytest_plugins = ["tests.support.server_fixtures"]
SWEEPS = "llmcloud/api/sweeps"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "source is missing"),
        ({"source": "if"}, 400, "SyntaxError"),
        ({"source": "1", "trials": 0}, 400, "trials '0': expected at least 1"),
        ({"source": "1", "direction": "up"}, 400, "Choose one of minimize, maximize"),
        ({"source": "1", "prune": "ashaa"}, 400, "Did you mean asha?"),
        ({"source": "1", "sampler": "tpee"}, 400, "Choose one of tpe, gp, cmaes, grid, random"),
        ({"source": "1", "storage": "ftp://host/x"}, 400, "choose sqlite://"),
        ({"source": "1", "storage": "/no/such/study"}, 400, "there is no folder /no/such"),
        ({"source": "1", "storage": "sqlite://"}, 400, "ranks could not see it. Name a file"),
        ({"source": "1", "pushed": "é"}, 400, "pushed is no base64"),
        ({"source": "1", "resume": True}, 400, "--resume needs the --name"),
        ({"source": "1", "resume": True, "name": "nothing"}, 404, "there is no sweep 'nothing'"),
        ({"source": "1", "name": "x" * 120}, 400, "is not the name of a sweep"),
    ],
)
async def test_what_cannot_be_searched_is_refused_by_name(
    server: Server, body: dict[str, Any], status: int, words: str
) -> None:
    answer = await server.ask("POST", SWEEPS, body)
    assert answer.status_code == status and words in answer.json()["message"]
    assert (await server.ask("GET", SWEEPS)).json() == {"sweeps": []}


async def test_a_sweep_that_can_have_no_ranks_has_failed_and_its_name_is_taken(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def place(*_: Any, **__: Any) -> None:
        raise CapacityError("-n 5: the cluster holds 2 ranks.")

    monkeypatch.setattr(server.pool, "place", place)
    body = {"source": "1", "nproc": 5, "metric": "loss", "storage": None}
    told = (await server.ask("POST", SWEEPS, {**body, "name": "big"})).json()
    assert told["state"] == "running" and told["spec"]["nproc"] == 5
    await until(lambda: not len(server.context.sweeps), "it has ended")
    told = (await server.ask("GET", f"{SWEEPS}/big")).json()
    assert (told["state"], told["reason"]) == ("failed", "-n 5: the cluster holds 2 ranks.")
    again = await server.ask("POST", SWEEPS, {**body, "name": "big"})
    assert again.status_code == 409 and "--resume goes on with it" in again.json()["message"]
    other = await server.ask("POST", SWEEPS, {"name": "big", "resume": True, "metric": "accuracy"})
    assert other.status_code == 400 and "began with loss, and" in other.json()["message"]
    stopped = await server.ask("POST", f"{SWEEPS}/big/stop", {})
    assert stopped.status_code == 400 and "it is failed" in stopped.json()["message"]
    assert (await server.ask("DELETE", f"{SWEEPS}/big")).json() == {"name": "big"}
    assert (await server.ask("GET", f"{SWEEPS}/big")).status_code == 404


async def test_what_a_study_cannot_change_is_refused_with_both_values_and_the_rest_is_changed(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def place(*_: Any, **__: Any) -> None:
        raise CapacityError("full.")

    monkeypatch.setattr(server.pool, "place", place)
    began = {"direction": "maximize", "sampler": "random", "prune": "median", "trials": 7, "storage": "mine.journal"}
    cell = {"code": "1", "folder": str(tmp_path)}
    body = {"source": "1", "cell": cell, "name": "kept", **began}
    assert (await server.ask("POST", SWEEPS, body)).status_code == 201
    await until(lambda: not len(server.context.sweeps), "it has ended")
    for option, value, was in [
        ("direction", "minimize", "with maximize"),
        ("metric", "loss", "without it"),
        ("storage", "/tmp/other", f"with {tmp_path}/mine.journal"),
    ]:
        answer = await server.ask("POST", SWEEPS, {"name": "kept", "resume": True, option: value})
        words = f"--{option} {value}: the sweep 'kept' began {was}, and goes on so."
        assert answer.status_code == 400 and words in answer.json()["message"]
        assert (await server.ask("GET", f"{SWEEPS}/kept")).json()["spec"] == {
            "name": "kept", **began, "storage": f"{tmp_path}/mine.journal",
        }  # fmt: skip
    # What is a default is an answer, too.
    changed = {"sampler": "tpe", "prune": "none", "trials": 20, "direction": "maximize", "storage": "mine.journal"}
    again = await server.ask("POST", SWEEPS, {"cell": cell, "name": "kept", "resume": True, **changed})
    assert again.status_code == 201
    kept = {"name": "kept", "direction": "maximize", "storage": f"{tmp_path}/mine.journal"}
    assert again.json()["spec"] == kept and (tmp_path / "mine.journal").exists()
    await until(lambda: not len(server.context.sweeps), "it has ended")


def test_a_file_named_from_the_notebook_is_the_same_for_server_and_ranks() -> None:
    assert absolute_storage("sqlite:///study.db?timeout=3", "/srv") == "sqlite:////srv/study.db?timeout=3"
    assert absolute_storage("sqlite+pysqlite:////a/study.db", "/srv") == "sqlite+pysqlite:////a/study.db"
    assert absolute_storage("studies/one", "/srv") == "/srv/studies/one"
    assert absolute_storage("postgresql://me@host/db", "/srv") == "postgresql://me@host/db"
