"""Batches from a kernel or a script: many inputs to an endpoint, their answers in the order of the inputs."""

from __future__ import annotations

import builtins
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.core.data.rows import rows_of
from jupyter_llmcloud.core.serving.batch_rows import WINDOW, WINDOWS
from jupyter_llmcloud.errors import ServerError, UsageError

if TYPE_CHECKING:
    import httpx

MAX_BYTES = 48 << 20  # of one upload
MAX_ROWS = 50_000
LOOK_EVERY_S = 0.5
ENDED = ("completed", "failed", "expired", "cancelled")
ROWS = "llmcloud_rows"  # in the metadata of a batch: the hash of all rows of the call that has begun it
_ROUTES = {"prompt": "completions", "messages": "chat/completions", "input": "embeddings"}

Send = Callable[["httpx.Request"], "httpx.Response"]
Progress = Callable[[int, int], None]


def as_body(number: int, item: Any, column: str | None, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The route and the body for one input.

    Args:
        number: of the input, for whoever has to find it.
        item: a text (to be continued), a list of messages, or a mapping that holds `prompt` or `messages`.
        column: of a mapping, the field that holds the input.

    Raises:
        UsageError: it is none of these.
    """
    value = item
    if column is not None:
        if not isinstance(item, Mapping) or column not in item:
            known = f" It has {', '.join(map(str, item))}." if isinstance(item, Mapping) else ""
            raise UsageError(f"input {number} has no column {column!r}.{known}")
        value = item[column]
    if hasattr(value, "tolist"):  # as Parquet gives a list
        value = value.tolist()
    if isinstance(value, str):
        return "completions", {"prompt": value, **params}
    if isinstance(value, Sequence) and value and all(isinstance(part, Mapping) and "role" in part for part in value):
        return "chat/completions", {"messages": [dict(part) for part in value], **params}
    if isinstance(value, Mapping):
        for field, route in _ROUTES.items():
            if field in value:
                return route, {field: value[field], **params}
    raise UsageError(
        f"input {number} is {value!r:.80}: it must be a text, a list of messages, or hold one as `prompt`, `messages` "
        "or in the column that column= names."
    )


def as_rows(inputs: Any) -> Iterable[Any]:
    """The inputs one by one. Raises UsageError for what would be taken apart into something else: letters, names."""
    if isinstance(inputs, str | bytes):
        raise UsageError(
            "map() takes many inputs, and this is one text: ask with complete() or chat(), or give [text]."
        )
    if isinstance(inputs, Mapping):
        names = list(inputs)
        raise UsageError(
            f"map() takes a list of inputs or a data set, and this is a mapping of {', '.join(map(repr, names))[:80]}: "
            f"give one of its values{f' (inputs[{names[0]!r}])' if names else ''}, or [inputs] for one input."
        )
    # A table gives its columns, or their names, one by one.
    if hasattr(inputs, "iterrows") and hasattr(inputs, "partitions"):  # of Dask: only one part of it is held at once
        return (row for part in inputs.partitions for row in rows_of(part.compute()) or ())
    if (rows := rows_of(inputs)) is not None:
        return rows
    if not hasattr(inputs, "__iter__") and not hasattr(inputs, "__getitem__"):
        raise UsageError(f"map() takes a list of inputs or a data set, not {inputs!r:.80}.")
    return inputs


def row_groups(
    model: str, inputs: Iterable[Any], column: str | None, params: Mapping[str, Any]
) -> Iterator[tuple[str, list[bytes]]]:
    """(route, lines) of the batches that these inputs make: each small enough to be uploaded. Raises UsageError."""
    route, lines, size = "", list[bytes](), 0
    for number, item in enumerate(as_rows(inputs)):
        wanted, body = as_body(number, item, column, params)
        if route and wanted != route:
            raise UsageError(f"input {number} goes to {wanted}, the ones before it to {route}: use one kind in a call.")
        row = {"custom_id": str(number), "method": "POST", "url": f"/v1/{wanted}", "body": {"model": model, **body}}
        line = _encoded(row, number)
        if lines and (size + len(line) > MAX_BYTES or len(lines) == MAX_ROWS):
            yield route, lines
            lines, size = [], 0
        route = wanted
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield route, lines


def check_window(window: str) -> None:
    """Before anything is sent. Raises UsageError."""
    if not isinstance(window, str) or not re.fullmatch(WINDOW, window):
        raise UsageError(f"window={window!r:.80} is not possible: write it as in {' or '.join(WINDOWS)}.")


def _encoded(row: Mapping[str, Any], number: int) -> bytes:
    """A row as JSON, with what NumPy has made of lists and numbers as it was. Raises UsageError."""
    try:
        return json.dumps(row, default=lambda value: value.tolist()).encode()
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"input {number} cannot be sent: {error}.") from None


@dataclass(frozen=True)
class Begun:
    """Rows that are being answered.

    Attributes:
        num_rows: all of them.
        answered: lines of those that an earlier call had answers for, by the number of their input.
        batch_id: of the batch with the others; None where there are none.
    """

    num_rows: int
    answered: dict[int, dict[str, Any]]
    batch_id: str | None


class BatchClient:
    """Files and batches of one server.

    Args:
        http: a connection pool that is signed in to Jupyter: batches begun with a scoped key would belong to that.
        base_url: ends in /v1.
        send: sends a request, and raises what the server refuses it with.
    """

    def __init__(self, http: httpx.Client, base_url: str, send: Send) -> None:
        self._http = http
        self._url = base_url
        self._send = send

    def begin(self, route: str, lines: builtins.list[bytes], window: str, served: str, fresh: bool) -> Begun:
        """Have rows answered. What an earlier call with the same rows left unfinished is gone on with: that has been
        interrupted, or its kernel has gone.

        Args:
            route: below /v1.
            lines: the rows.
            window: see `Endpoint.map`.
            served: tells the model by which they are answered from others.
            fresh: ask for all of them, whatever was answered before.
        """
        check_window(window)
        rows = hashlib.sha256(b"\n".join([served.encode(), route.encode(), *lines])).hexdigest()
        unfinished = [] if fresh else self._unfinished(rows)
        answered = self._answered_before(unfinished)
        for batch in unfinished:
            if batch["status"] not in ENDED:  # it has all that was not answered then
                return Begun(len(lines), answered, str(batch["id"]))
        rest = [line for line in lines if int(json.loads(line)["custom_id"]) not in answered] if answered else lines
        return Begun(len(lines), answered, self._begin(route, rest, window, rows) if rest else None)

    def _unfinished(self, rows: str) -> builtins.list[dict[str, Any]]:
        """The batches of a call that has not come to its end, the newest first."""
        known = [batch for batch in self.list() if batch["metadata"].get(ROWS) == rows]
        found = list(itertools.takewhile(lambda batch: batch["status"] != "completed", known))
        ending = [batch["id"] for batch in found if batch["status"] == "cancelling"]
        ended = {batch["id"]: batch for batch in self.wait(ending, lambda *_: None)}
        return [ended.get(batch["id"], batch) for batch in found]

    def _answered_before(self, unfinished: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for batch in unfinished:
            if batch["status"] in ENDED:
                found |= {number: line for number, line in self.answers(batch).items() if is_answered(line)}
        return found

    def _begin(self, route: str, lines: builtins.list[bytes], window: str, rows: str) -> str:
        files = {"file": ("input.jsonl", b"\n".join(lines))}
        file = self._ask("POST", "files", files=files, data={"purpose": "batch"})
        about = {"endpoint": f"/v1/{route}", "completion_window": window, "metadata": {ROWS: rows}}
        body = {"input_file_id": file["id"], **about}
        batch = self._ask("POST", "batches", json=body)
        self._ask("DELETE", f"files/{file['id']}")  # the batch has its rows
        return str(batch["id"])

    def get(self, batch_id: str) -> dict[str, Any]:
        """How far a batch is."""
        return self._ask("GET", f"batches/{batch_id}")

    def list(self) -> builtins.list[dict[str, Any]]:
        """The batches that may be seen, the newest first."""
        rows: builtins.list[dict[str, Any]] = self._ask("GET", "batches")["data"]
        return rows

    def cancel(self, batch_id: str) -> None:
        """End a batch, if it is not over; what was answered is kept."""
        if self.get(batch_id)["status"] in ("validating", "in_progress"):
            self._ask("POST", f"batches/{batch_id}/cancel")

    def wait(self, batch_ids: Sequence[str], progress: Progress) -> builtins.list[dict[str, Any]]:
        """Wait until these batches are over. `progress` is told the rows that are over, and all."""
        while True:
            batches = [self.get(batch_id) for batch_id in batch_ids]
            counts = [batch["request_counts"] for batch in batches]
            progress(sum(c["completed"] + c["failed"] for c in counts), sum(c["total"] for c in counts))
            if all(batch["status"] in ENDED for batch in batches):
                return batches
            time.sleep(LOOK_EVERY_S)

    def answers(self, batch: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """The lines of a batch that is over, answered and not, by the number of their input."""
        found: dict[int, dict[str, Any]] = {}
        for file_id in (batch["output_file_id"], batch["error_file_id"]):
            if file_id is not None:
                request = self._http.build_request("GET", f"{self._url}/files/{file_id}/content")
                for text in self._send(request).text.split("\n"):
                    if not text:
                        continue
                    line = json.loads(text)
                    found[int(line["custom_id"])] = line
        return found

    def _ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        request = self._http.build_request(method, f"{self._url}/{path}", **content)
        answer: dict[str, Any] = self._send(request).json()
        return answer


def is_answered(line: Mapping[str, Any]) -> bool:
    """Whether a line of a batch holds an answer."""
    return line["error"] is None and line["response"]["status_code"] == 200


def answer_of(line: Mapping[str, Any] | None) -> Any:
    """What an answered line says: a text or an embedding, a list where several were asked for. Raises ServerError."""
    if line is None:
        raise ServerError("it was not answered.")
    response, error = line["response"], line["error"]
    if error is not None:
        raise ServerError(str(error["message"]))
    body = response["body"]
    if response["status_code"] != 200:
        told = body.get("error") if isinstance(body, dict) else None
        raise ServerError(str((told or {}).get("message") or f"status {response['status_code']}"))
    if "choices" in body:
        found = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body["choices"]]
    else:
        found = [row["embedding"] for row in body["data"]]
    return found[0] if len(found) == 1 else found
