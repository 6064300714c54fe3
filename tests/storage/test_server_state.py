"""The database of the servers."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from pathlib import Path

import pytest

from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.errors import NotFound
from jupyter_llmcloud.storage import server_state
from jupyter_llmcloud.storage.server_state import RequestRecord, ServerState, StoredEndpoint, StoredKey, StoredReplica


def make_key(name: str = "k1", **values: object) -> StoredKey:
    fields = {"digest": "d" * 64, "label": "", "scopes": ["infer:*"], "owner": "me", "created": 1.0}
    return StoredKey(**{"id": name, **fields, "expires": None, "revoked": None, **values})


def test_the_file_and_its_log_are_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        state = ServerState(tmp_path / "server.sqlite")
        state.add_key(make_key())
    finally:
        os.umask(before)
    files = list(tmp_path.iterdir())
    assert {file.name for file in files} >= {"server.sqlite", "server.sqlite-wal"}
    assert [file.stat().st_mode & 0o077 for file in files] == [0] * len(files)
    state.close()


def test_an_endpoint_is_found_again_by_the_server_that_adopts_it(tmp_path: Path) -> None:
    state = ServerState(tmp_path / "server.sqlite")
    state.register_server("old", 1, 0.0, headless=False)
    revisions = [Revision(1, "/model", num_replicas=0, weight=0), Revision(2, "/better", "run", "f2", "bfloat16", 3)]
    replicas = [StoredReplica("r1", 2, "local", "/a.sock", "t", "/there.sock", "/bridge.sock", "/log", 7)]
    saved = StoredEndpoint("tiny", revisions, "ready", "one is slow", 3.0, "local", replicas)
    state.save_endpoint("old", saved)
    assert state.endpoints("new") == []
    state.adopt_endpoints("old", "new")
    state.forget_server("old")
    assert state.endpoints("new") == [saved]
    assert state.servers() == []
    state.close()


def test_an_endpoint_of_before_there_were_revisions_is_read_as_its_first(tmp_path: Path) -> None:
    replica = {"id": "r1", "agent": "/a.sock", "token": "t", "socket": "/r1.sock", "log": "/r1.log", "pid": 7}
    record = {
        "name": "tiny", "model": "/model", "target": "train", "revision": "0123456789ab", "state": "ready",
        "reason": "", "created": 5.0, "num_replicas": 2, "dtype": "float16", "cluster": "wide", "replicas": [replica],
    }  # fmt: skip
    database = sqlite3.connect(tmp_path / "server.sqlite")
    database.executescript(
        "CREATE TABLE servers (id TEXT PRIMARY KEY, pid INTEGER, started REAL, headless INTEGER);"
        "CREATE TABLE endpoints (server_id TEXT, name TEXT, state TEXT, record TEXT, PRIMARY KEY (server_id, name));"
    )
    database.execute("INSERT INTO endpoints VALUES ('old', 'tiny', 'ready', ?)", (json.dumps(record),))
    database.commit()
    database.close()
    state = ServerState(tmp_path / "server.sqlite")
    [endpoint] = state.endpoints("old")
    assert endpoint.revisions == [Revision(1, "/model", "train", "0123456789ab", "float16", 2)]
    assert (endpoint.name, endpoint.state, endpoint.created, endpoint.cluster) == ("tiny", "ready", 5.0, "wide")
    assert endpoint.replicas == [
        StoredReplica("r1", 1, "", "/a.sock", "t", "/r1.sock", "/r1.sock", "/r1.log", 7),
    ]
    state.save_endpoint("old", endpoint)
    assert state.endpoints("old") == [endpoint]
    state.close()


def test_of_two_endpoints_with_one_name_the_adopting_servers_own_stays(tmp_path: Path) -> None:
    state = ServerState(tmp_path / "server.sqlite")
    state.save_endpoint("old", StoredEndpoint("tiny", [Revision(1, "/old")]))
    state.save_endpoint("new", StoredEndpoint("tiny", [Revision(1, "/new")]))
    state.adopt_endpoints("old", "new")
    state.forget_server("old")
    assert [endpoint.current.model for endpoint in state.endpoints("new")] == ["/new"]
    assert state.endpoints("old") == []
    state.close()


def test_a_revoked_key_is_seen_by_another_server_at_once(tmp_path: Path) -> None:
    first, second = ServerState(tmp_path / "server.sqlite"), ServerState(tmp_path / "server.sqlite")
    first.add_key(make_key())
    assert second.key("k1").is_valid(now=2.0)
    first.revoke_key("k1", now=3.0)
    assert not second.key("k1").is_valid(now=3.0)
    first.close()
    second.close()


def test_a_key_is_valid_until_it_expires(tmp_path: Path) -> None:
    key = make_key(expires=10.0)
    assert key.is_valid(now=9.9)
    assert not key.is_valid(now=10.0)


def test_revoking_twice_keeps_the_first_time_and_revoking_nothing_is_an_error(tmp_path: Path) -> None:
    state = ServerState(tmp_path / "server.sqlite")
    state.add_key(make_key())
    state.revoke_key("k1", now=3.0)
    state.revoke_key("k1", now=4.0)
    assert state.key("k1").revoked == 3.0
    with pytest.raises(NotFound, match="'k2'"):
        state.revoke_key("k2", now=3.0)
    state.close()


def test_audit_and_usage_are_read_newest_first(tmp_path: Path) -> None:
    state = ServerState(tmp_path / "server.sqlite")
    state.add_audit("me", "key.mint", "k1", "done", {"scopes": ["infer:*"]})
    state.add_audit("me", "key.revoke", "k1", "done", {})
    state.add_usage([RequestRecord(f"r{number}", "key:k1", "tiny", "completions", 200, 0.1) for number in range(3)])
    assert [row["action"] for row in state.audit()] == ["key.revoke", "key.mint"]
    assert state.audit()[1]["detail"] == {"scopes": ["infer:*"]}
    assert [row["request_id"] for row in state.usage(limit=2)] == ["r2", "r1"]
    state.close()


def test_old_requests_are_forgotten_and_what_keys_have_used_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_state, "MAX_DELETED", 2)
    state = ServerState(tmp_path / "server.sqlite")
    times = [10.0, 20.0, 31.0, 29.0, 40.0]  # of two servers, as they came
    state.add_usage([RequestRecord(f"r{t:.0f}", "key:k1", "tiny", "chat", 200, 0.1, t=t) for t in times])
    assert state.prune_usage(before=30.0) == 3
    assert [row["request_id"] for row in state.usage()] == ["r40", "r31"]
    assert state.key_usage()[0].requests == 5
    assert state.prune_usage(before=30.0) == 0
    state.close()


def test_many_threads_and_two_servers_may_write(tmp_path: Path) -> None:
    states = [ServerState(tmp_path / "server.sqlite") for _ in range(2)]

    def write(number: int) -> None:
        for index in range(20):
            states[number % 2].add_audit("me", "run.stop", f"{number}-{index}", "done", {})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(states[0].audit(limit=1000)) == 120
    for state in states:
        state.close()
