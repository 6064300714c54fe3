"""What Jupyter servers remember in `<root>/server.sqlite` (WAL, 0600): endpoints, digests of keys, usage, audit.

Several servers of one user share the file. An endpoint belongs to the server whose `server_id` its row carries; keys
belong to the user. A change made by one server is seen by the others with their next read: nothing is cached.
"""

from __future__ import annotations

import functools
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config
from jupyter_llmcloud.core.serving.endpoint.revision import Revision
from jupyter_llmcloud.core.serving.endpoint.rollout import RETIRED, STABLE, with_role
from jupyter_llmcloud.core.serving.usage.quota import WINDOW_S, KeyLimits
from jupyter_llmcloud.errors import NotFound

_SCHEMA = """
CREATE TABLE IF NOT EXISTS servers (id TEXT PRIMARY KEY, pid INTEGER, started REAL, headless INTEGER);
CREATE TABLE IF NOT EXISTS endpoints (
    server_id TEXT, name TEXT, state TEXT, record TEXT, PRIMARY KEY (server_id, name));
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, label TEXT, scopes TEXT NOT NULL, owner TEXT,
    created REAL NOT NULL, expires REAL, revoked REAL);
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, t REAL, actor TEXT, action TEXT, subject TEXT, outcome TEXT, detail TEXT);
CREATE TABLE IF NOT EXISTS usage (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, t REAL, request_id TEXT, actor TEXT, endpoint TEXT, replica TEXT,
    route TEXT, status INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER,
    first_byte_s REAL, duration_s REAL, outcome TEXT);
CREATE INDEX IF NOT EXISTS usage_by_endpoint ON usage (endpoint, t);
CREATE INDEX IF NOT EXISTS usage_by_request ON usage (request_id);
CREATE INDEX IF NOT EXISTS usage_by_actor ON usage (actor, t);
CREATE TABLE IF NOT EXISTS key_usage (
    key_id TEXT, day TEXT, requests INTEGER NOT NULL, refused INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, last_used REAL NOT NULL, PRIMARY KEY (key_id, day));
CREATE INDEX IF NOT EXISTS audit_by_action ON audit (action, seq);
"""
_LATER_COLUMNS = {  # of tables that earlier versions have made without them
    "keys": {
        "requests_per_minute": "INTEGER",
        "tokens_per_minute": "INTEGER",
        "parallel_requests": "INTEGER",
        "replaced_by": "TEXT",
    }
}
_COUNT_KEYS = """
INSERT INTO key_usage VALUES (:key_id, :day, 1, :refused, :prompt_tokens, :completion_tokens, :t)
ON CONFLICT (key_id, day) DO UPDATE SET
    requests = requests + 1, refused = refused + excluded.refused,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    last_used = max(last_used, excluded.last_used)
"""
MAX_KEYS = 10_000  # that are held in memory
MAX_DELETED = 1_000  # rows in one transaction
KEY_ACTOR = "key:"  # before the id, where a key is the actor of a request


@dataclass(frozen=True)
class StoredReplica:
    """One replica as it is kept: with this a later server finds it again.

    Attributes:
        revision: number of the revision that it serves.
        cluster: the cluster on which it was placed.
        agent: a socket on this host for the agent that started it.
        token: the bearer token that its requests must carry.
        home: its socket on the host where it runs.
        socket: the socket on this host that reaches it: `home` itself, or a bridge to it.
    """

    id: str
    revision: int = 1
    cluster: str = ""
    agent: str = ""
    token: str = ""
    home: str = ""
    socket: str = ""
    log: str = ""
    pid: int = 0


@dataclass
class StoredEndpoint:
    """One endpoint as it is kept; its revisions as in `core.serving.endpoint.rollout`.

    Attributes:
        adapters: folders of adapters, by the names under which they are asked for.
        follows: the run whose newest weights it serves; "": none.
        start_s: how long its last replica took from nothing to ready; None: not known.
    """

    name: str
    revisions: list[Revision]
    state: str = "starting"
    reason: str = ""
    created: float = 0.0
    cluster: str | None = None
    replicas: list[StoredReplica] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    follows: str = ""
    start_s: float | None = None

    @property
    def current(self) -> Revision:
        """The revision that answers, but for a share that a canary has."""
        return with_role(self.revisions, STABLE) or self.revisions[-1]

    def paths(self) -> set[str]:
        """What its revisions are made of."""
        parts = [path for item in self.revisions for path in (item.model, item.source, item.base_model)]
        return {path for path in (*parts, *self.adapters.values()) if path}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> StoredEndpoint:
        """Read a record; one from before there were revisions becomes revision 1."""
        revisions = _with_roles(record.get("revisions") or [_only_revision(record)])
        replicas = [_known(StoredReplica, {"home": row.get("socket", ""), **row}) for row in record.get("replicas", [])]
        read = {**record, "revisions": [_known(Revision, row) for row in revisions], "replicas": replicas}
        endpoint: StoredEndpoint = _known(cls, read)
        return endpoint


def _with_roles(revisions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a version that had no roles, the last one was served, and the others were kept with no replicas."""
    served = len(revisions) - 1
    return [{"role": STABLE if at == served else RETIRED, **row} for at, row in enumerate(revisions)]


def _only_revision(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "number": 1, "fingerprint": record.get("revision", "")}


def _known(kind: Any, fields: dict[str, Any]) -> Any:
    """A record of another version of this package may hold more."""
    return kind(**{name: value for name, value in fields.items() if name in kind.__dataclass_fields__})


@dataclass(frozen=True)
class StoredKey:
    """One key as it is kept: never its secret. `replaced_by`: the key that was made in its place."""

    id: str
    digest: str
    label: str
    scopes: list[str]
    owner: str
    created: float
    expires: float | None
    revoked: float | None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    replaced_by: str | None = None

    @functools.cached_property
    def limits(self) -> KeyLimits:
        """How much it may ask."""
        return KeyLimits(self.requests_per_minute, self.tokens_per_minute, self.parallel_requests)

    def is_valid(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True)
class RequestRecord:
    """One request to an endpoint, as it ended."""

    request_id: str
    actor: str
    endpoint: str
    route: str
    status: int
    duration_s: float
    replica: str = ""
    first_byte_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    outcome: str = "done"
    t: float = 0.0

    @property
    def key_id(self) -> str | None:
        """Of the key that asked; None for somebody signed in to Jupyter."""
        return self.actor.removeprefix(KEY_ACTOR) if self.actor.startswith(KEY_ACTOR) else None

    def counted(self) -> dict[str, Any]:
        """What it adds to the usage of its key. Days are those of UTC."""
        return {
            "key_id": self.key_id,
            "day": datetime.fromtimestamp(self.t, UTC).date().isoformat(),
            "refused": int(400 <= self.status < 500 and self.status != 499),
            "prompt_tokens": self.prompt_tokens or 0,
            "completion_tokens": self.completion_tokens or 0,
            "t": self.t,
        }


@dataclass(frozen=True)
class RowRecord(RequestRecord):
    """A row of a batch, as it ended: nobody waited for its answer."""


@dataclass(frozen=True)
class KeyUsage:
    """What a key has asked on one day."""

    key_id: str
    day: str
    requests: int
    refused: int
    prompt_tokens: int
    completion_tokens: int
    last_used: float


_INSERT_KEY = "INSERT INTO keys ({}) VALUES ({})".format(
    ", ".join(StoredKey.__dataclass_fields__), ", ".join("?" * len(StoredKey.__dataclass_fields__))
)


class ServerState:
    """The file, open. Safe to use from several threads; each call is one short transaction."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or config.root() / "server.sqlite"
        self._log_path = f"{self.path}-wal"
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite gives its -wal and -shm files the mode of the file itself.
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        os.chmod(self.path, 0o600)
        self._lock = threading.Lock()
        self._keys: dict[str, tuple[tuple[Any, ...], StoredKey]] = {}
        self._database = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_SCHEMA)
        self._add_later_columns()

    def _add_later_columns(self) -> None:
        for table, columns in _LATER_COLUMNS.items():
            known = {row["name"] for row in self._rows(f"PRAGMA table_info({table})")}
            for name in columns.keys() - known:
                try:
                    self._change(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
                except sqlite3.OperationalError as error:  # another server was faster
                    if "duplicate column" not in str(error):
                        raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _change(self, statement: str, *values: Any) -> int:
        with self._lock:
            return self._database.execute(statement, values).rowcount

    def _rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()

    # --- servers and their endpoints ---

    def register_server(self, server_id: str, pid: int, started: float, headless: bool) -> None:
        """A server has begun; `started` tells it from another process that later gets its pid."""
        self._change("INSERT OR REPLACE INTO servers VALUES (?, ?, ?, ?)", server_id, pid, started, int(headless))

    def servers(self) -> list[dict[str, Any]]:
        """[{id, pid, started, headless}] of every server that has ever begun and not been forgotten."""
        return [dict(row) for row in self._rows("SELECT * FROM servers")]

    def forget_server(self, server_id: str) -> None:
        """A server is gone, and so are the endpoints which nobody has adopted."""
        self._change("DELETE FROM endpoints WHERE server_id = ?", server_id)
        self._change("DELETE FROM servers WHERE id = ?", server_id)

    def save_endpoint(self, server_id: str, endpoint: StoredEndpoint) -> None:
        """Keep an endpoint, replacing what was known of it."""
        record = json.dumps(asdict(endpoint), separators=(",", ":"))
        self._change(
            "INSERT OR REPLACE INTO endpoints VALUES (?, ?, ?, ?)",
            server_id,
            endpoint.name,
            endpoint.state,
            record,
        )

    def endpoints(self, server_id: str) -> list[StoredEndpoint]:
        """The endpoints of a server."""
        rows = self._rows("SELECT record FROM endpoints WHERE server_id = ? ORDER BY name", server_id)
        return [StoredEndpoint.from_record(json.loads(row["record"])) for row in rows]

    def served_paths(self) -> set[str]:
        """What the revisions of every endpoint of every server are made of: folders, files of code, adapters."""
        rows = self._rows("SELECT record FROM endpoints")
        stored = [StoredEndpoint.from_record(json.loads(row["record"])) for row in rows]
        return {path for endpoint in stored for path in endpoint.paths()}

    def adopt_endpoints(self, old_server_id: str, server_id: str) -> None:
        """Give the endpoints of a server that is gone to another; of two with one name the new owner's stays."""
        self._change("UPDATE OR IGNORE endpoints SET server_id = ? WHERE server_id = ?", server_id, old_server_id)

    def delete_endpoint(self, server_id: str, name: str) -> None:
        """Keep an endpoint no longer."""
        self._change("DELETE FROM endpoints WHERE server_id = ? AND name = ?", server_id, name)

    # --- keys ---

    def stamp(self) -> tuple[int, int, int]:
        """Another one after whatever any server has written; within milliseconds of each other it may be the same."""
        try:
            told = os.stat(self._log_path)
        except FileNotFoundError:
            told = os.stat(self.path)
        return told.st_mtime_ns, told.st_size, told.st_ino

    def add_key(self, key: StoredKey) -> None:
        """Keep a new key."""
        self._change(_INSERT_KEY, *_key_values(key))

    def key(self, key_id: str) -> StoredKey | None:
        """The key with this id, valid or not."""
        rows = self._rows("SELECT * FROM keys WHERE id = ?", key_id)
        if not rows:
            return None
        row = tuple(rows[0])
        known = self._keys.get(key_id)  # read anew each time, made anew when it has changed
        if known is None or known[0] != row:
            if len(self._keys) >= MAX_KEYS:
                self._keys.clear()
            known = self._keys[key_id] = row, _stored_key(rows[0])
        return known[1]

    def list_keys(self) -> list[StoredKey]:
        """Every key, the newest first."""
        return [_stored_key(row) for row in self._rows("SELECT * FROM keys ORDER BY created DESC, id")]

    def revoke_key(self, key_id: str, now: float) -> None:
        """End a key; raises NotFound when there is none."""
        if not self._change("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ?", now, key_id):
            raise NotFound(f"there is no key {key_id!r}: %endpoints keys list shows their ids.")

    def replace_key(self, key_id: str, new: StoredKey, ends: float) -> None:
        """Keep a new key in place of one, which ends then, or before as it would have; raises NotFound."""
        with self._lock, self._transaction():
            changed = self._database.execute(
                "UPDATE keys SET replaced_by = ?, expires = min(coalesce(expires, ?), ?)"
                " WHERE id = ? AND revoked IS NULL",
                (new.id, ends, ends, key_id),
            ).rowcount
            if not changed:
                raise NotFound(f"there is no key {key_id!r} that is valid: %endpoints keys list shows their ids.")
            self._database.execute(_INSERT_KEY, _key_values(new))

    def key_usage(self, since_day: str = "") -> list[KeyUsage]:
        """What each key has asked on each day since that one (2026-11-28, of UTC), the newest day first."""
        rows = self._rows("SELECT * FROM key_usage WHERE day >= ? ORDER BY day DESC, key_id", since_day)
        return [KeyUsage(**dict(row)) for row in rows]

    def last_used(self) -> dict[str, float]:
        """When each key was used last, by its id."""
        rows = self._rows("SELECT key_id, max(last_used) AS t FROM key_usage GROUP BY key_id")
        return {row["key_id"]: row["t"] for row in rows}

    def recent_requests(self, key_id: str, now: float) -> list[tuple[float, int]]:
        """When each request of a key ended within the last minute, and its tokens; of all servers, oldest first."""
        rows = self._rows(
            "SELECT t, coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0) AS tokens FROM usage"
            " WHERE actor = ? AND t > ? AND status != 429 ORDER BY t",
            KEY_ACTOR + key_id,
            now - WINDOW_S,
        )
        return [(row["t"], row["tokens"]) for row in rows]

    # --- what happened ---

    def add_audit(self, actor: str, action: str, subject: str, outcome: str, detail: dict[str, Any]) -> None:
        """Append to the audit."""
        self._change(
            "INSERT INTO audit (t, actor, action, subject, outcome, detail) VALUES (?, ?, ?, ?, ?, ?)",
            time.time(), actor, action, subject, outcome, json.dumps(detail, default=str),
        )  # fmt: skip

    def audit(self, limit: int = 100, action: str | None = None) -> list[dict[str, Any]]:
        """The newest rows of the audit, newest first; only those of one action where it is named."""
        where, values = ("WHERE action = ?", [action]) if action else ("", [])
        rows = self._rows(f"SELECT * FROM audit {where} ORDER BY seq DESC LIMIT ?", *values, limit)
        return [{**dict(row), "detail": json.loads(row["detail"])} for row in rows]

    def add_usage(self, usages: list[RequestRecord]) -> None:
        """Append requests in one transaction."""
        names = list(RequestRecord.__dataclass_fields__)
        statement = f"INSERT INTO usage ({', '.join(names)}) VALUES ({', '.join(':' + name for name in names)})"
        with self._lock, self._transaction():
            self._database.executemany(statement, [vars(usage) for usage in usages])  # of values: nothing to copy
            self._database.executemany(_COUNT_KEYS, [row.counted() for row in usages if row.key_id is not None])

    def prune_usage(self, before: float) -> int:
        """Forget requests that ended before that time, not what each key has used on each day; returns how many.

        A few at a time, the oldest first, so that nobody waits long for the file.
        """
        num_pruned, num_deleted = 0, MAX_DELETED
        while num_deleted == MAX_DELETED:
            oldest = "SELECT seq FROM usage ORDER BY seq LIMIT ?"
            num_deleted = self._change(f"DELETE FROM usage WHERE seq IN ({oldest}) AND t < ?", MAX_DELETED, before)
            num_pruned += num_deleted
        return num_pruned

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that is changed inside, or nothing."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def request(self, request_id: str) -> dict[str, Any] | None:
        """A request that has ended, by its id."""
        rows = self._rows("SELECT * FROM usage WHERE request_id = ? ORDER BY seq DESC LIMIT 1", request_id)
        return dict(rows[0]) if rows else None

    def answered(self, endpoint: str, limit: int) -> list[dict[str, Any]]:
        """The newest requests that an endpoint has answered, the newest first."""
        statement = "SELECT * FROM usage WHERE endpoint = ? AND status = 200 ORDER BY seq DESC LIMIT ?"
        return [dict(row) for row in self._rows(statement, endpoint, limit)]

    def usage(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest requests, newest first."""
        return [dict(row) for row in self._rows("SELECT * FROM usage ORDER BY seq DESC LIMIT ?", limit)]


def _key_values(key: StoredKey) -> list[Any]:
    return list({**asdict(key), "scopes": json.dumps(key.scopes)}.values())


def _stored_key(row: sqlite3.Row) -> StoredKey:
    key: StoredKey = _known(StoredKey, {**dict(row), "scopes": json.loads(row["scopes"])})
    return key
