"""What people said of answers, and what was asked and answered where that is kept: `<root>/feedback.sqlite`.

A file of its own (WAL, 0600), since it holds what was asked and answered, which nothing else of a server does.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud import config

_RESPONSES = "responses"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (
    request_id TEXT PRIMARY KEY, t REAL, endpoint TEXT, revision TEXT, route TEXT, request BLOB, answer BLOB);
CREATE INDEX IF NOT EXISTS kept_by_endpoint ON kept (endpoint, t);
CREATE TABLE IF NOT EXISTS feedback (
    request_id TEXT, actor TEXT, t REAL, endpoint TEXT, rating REAL, correction TEXT, comment TEXT, prompt TEXT,
    answer TEXT, metadata TEXT, PRIMARY KEY (request_id, actor));
CREATE INDEX IF NOT EXISTS feedback_by_endpoint ON feedback (endpoint, t);
"""


@dataclass(frozen=True)
class KeptRequest:
    """A request and its answer, as they went over the wire.

    Attributes:
        t: seconds since the epoch.
        revision: the fingerprint of the model that answered.
    """

    request_id: str
    t: float
    endpoint: str
    revision: str
    route: str
    request: bytes
    answer: bytes


@dataclass(frozen=True)
class Feedback:
    """What somebody said of one answer.

    Attributes:
        rating: from -1 (wrong) to 1 (right); None where nothing was said.
        correction: what should have been answered.
        prompt: what was asked, as JSON (a text or a list of messages), where the client told it.
        answer: what was answered, where the client told it.
    """

    request_id: str
    actor: str
    t: float
    endpoint: str
    rating: float | None = None
    correction: str | None = None
    comment: str | None = None
    prompt: str | None = None
    answer: str | None = None
    metadata: str = "{}"


class FeedbackStore:
    """The file, opened when it is first needed. Safe to use from several threads."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or config.root() / "feedback.sqlite"
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None

    def _database(self) -> sqlite3.Connection:
        if self._opened is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            database = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
            database.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000"):
                database.execute(f"PRAGMA {pragma}")
            database.executescript(_SCHEMA)
            self._opened = database
        return self._opened

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        names = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        with self._lock:
            self._database().execute(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({values})", row)

    def _rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._database().execute(statement, values).fetchall()

    def keep(self, request: KeptRequest) -> None:
        """Keep a request and its answer."""
        self._insert("kept", asdict(request))

    def kept(self, request_id: str) -> KeptRequest | None:
        """A request that was kept."""
        rows = self._rows("SELECT * FROM kept WHERE request_id = ?", request_id)
        return KeptRequest(**dict(rows[0])) if rows else None

    def add(self, feedback: Feedback) -> None:
        """Keep what somebody says; of what the same actor says of one request, the last rating, correction... count.

        A thumb and a correction may come one after the other: what is not said again stays.
        """
        row = {**asdict(feedback), "metadata": None if feedback.metadata == "{}" else feedback.metadata}
        told = ("rating", "correction", "comment", "prompt", "answer", "metadata")
        kept = ", ".join(f"{name} = COALESCE(excluded.{name}, {name})" for name in told)
        statement = (
            f"INSERT INTO feedback ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})"
            f" ON CONFLICT (request_id, actor) DO UPDATE SET t = excluded.t, endpoint = excluded.endpoint, {kept}"
        )
        with self._lock:
            self._database().execute(statement, row)

    def list(self, endpoint: str, limit: int = 1000) -> list[Feedback]:
        """What was said of an endpoint's answers, the newest first."""
        statement = "SELECT * FROM feedback WHERE endpoint = ? ORDER BY t DESC, request_id LIMIT ?"
        rows = [dict(row) for row in self._rows(statement, endpoint, limit)]
        return [Feedback(**{**row, "metadata": row["metadata"] or "{}"}) for row in rows]

    def ratings(self, endpoint: str) -> dict[str, float]:
        """The rating of each request that has one; of several the newest."""
        statement = "SELECT request_id, rating FROM feedback WHERE endpoint = ? AND rating IS NOT NULL ORDER BY t"
        return {row["request_id"]: row["rating"] for row in self._rows(statement, endpoint)}

    def training_rows(self, endpoint: str) -> Iterator[dict[str, Any]]:
        """The data set that corrections and good answers make, the oldest first.

        {"messages": [...]} of chats and {"prompt", "completion"} of completions, each with `request_id` and `rating`.
        A correction takes the place of the answer; an answer without one is a row when it was rated above 0. What was
        neither kept nor told by the client is left out.
        """
        for feedback in reversed(self.list(endpoint, -1)):
            if row := _training_row(feedback, self.kept(feedback.request_id)):
                yield {**row, "request_id": feedback.request_id, "rating": feedback.rating}


def _training_row(feedback: Feedback, kept: KeptRequest | None) -> dict[str, Any] | None:
    prompt = json.loads(feedback.prompt) if feedback.prompt is not None else _asked(kept)
    wanted = feedback.correction
    if wanted is None and (feedback.rating or 0) > 0:
        wanted = feedback.answer if feedback.answer is not None else _answered(kept)
    if prompt is None or wanted is None:
        return None
    if isinstance(prompt, list):
        return {"messages": [*prompt, {"role": "assistant", "content": wanted}]}
    return {"prompt": prompt, "completion": wanted}


def _asked(kept: KeptRequest | None) -> Any:
    if kept is None:
        return None
    body = json.loads(kept.request)
    if kept.route == _RESPONSES:
        return _conversation(body)
    asked = body.get("messages") or body.get("prompt")
    if isinstance(asked, list) and len(asked) == 1 and isinstance(asked[0], str):
        return asked[0]
    return asked if isinstance(asked, str) or (isinstance(asked, list) and _are_messages(asked)) else None


def _conversation(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The messages that a response answers; None where it goes on from another one, or from calls of tools."""
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    if body.get("previous_response_id") or any(item.get("type", "message") != "message" for item in items):
        return None
    first = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    return [*first, *({"role": item["role"], "content": _plain_text(item["content"])} for item in items)]


def _plain_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _are_messages(rows: list[Any]) -> bool:
    return all(isinstance(row, dict) and "role" in row for row in rows)


def _answered(kept: KeptRequest | None) -> str | None:
    """The text of the first choice, also of a stream."""
    if kept is None:
        return None
    is_stream = kept.answer.startswith((b"data:", b"event:"))
    told = list(_events(kept.answer)) if is_stream else [json.loads(kept.answer)]
    if kept.route == _RESPONSES:
        return _said(told[-1].get("response", told[-1])) if told else None
    texts = [_text(body, "delta" if is_stream else "message") for body in told]
    # One that only calls a tool has said nothing: that is no answer to learn.
    return "".join(text for text in texts if text) or None


def _events(stream: bytes) -> Iterator[dict[str, Any]]:
    for line in stream.split(b"\n"):
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data.startswith(b"{"):
            yield json.loads(data)


def _said(response: dict[str, Any]) -> str | None:
    """The text of a response's messages."""
    texts = [_plain_text(item["content"]) for item in response.get("output", ()) if item.get("type") == "message"]
    return "".join(texts) if texts else None


def _text(body: dict[str, Any], part: str) -> str | None:
    for choice in body.get("choices", ()):
        if choice.get("index", 0) == 0:
            text = choice["text"] if "text" in choice else (choice.get(part) or {}).get("content")
            return text if isinstance(text, str) else None
    return None
