"""One batch: its rows checked, asked as there is room, and put in order when all are over."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from jupyter_llmcloud.core.serving.batch_rows import (
    MAX_ROWS,
    BatchRow,
    RowRefused,
    back_off_s,
    num_rows_at_once,
    parse_row,
)
from jupyter_llmcloud.storage.serving.batches import BatchFolder, RowResult, StoredBatch

if TYPE_CHECKING:
    from logging import Logger

    from jupyter_llmcloud.server.batches.asking import RowAnswer
    from jupyter_llmcloud.storage.serving.uploads import FileStore

MAX_LOST = 3  # replicas that may die while they answer one row
MAX_ERRORS = 50
SAVE_EVERY_S = 1.0
LOOK_EVERY_S = 0.25


class Asker(Protocol):
    """What answers rows."""

    def endpoint_of(self, model: str) -> str:
        """The endpoint that is asked for a model, which may be one of its adapters."""
        ...

    def has(self, models: list[str]) -> bool:
        """Whether these endpoints are here, or models."""
        ...

    def may_ask(self, key_id: str | None, endpoint: str) -> bool:
        """Whether the batch may ask this endpoint."""
        ...

    def places(self, models: list[str]) -> tuple[int, int]:
        """(requests that can be answered at once, requests of others that wait)."""
        ...

    async def ask(self, row: BatchRow, route: str, owner: str, key_id: str | None) -> RowAnswer:
        """RowAnswer a row."""
        ...


class BatchRunner:
    """Works on one batch, whose lock it holds, until that is over.

    Args:
        ended: called with the batch when it is over.
    """

    def __init__(
        self,
        folder: BatchFolder,
        batch: StoredBatch,
        asker: Asker,
        files: FileStore,
        ended: Callable[[StoredBatch], None],
        log: Logger,
    ) -> None:
        self.batch = batch
        self._folder = folder
        self._asker = asker
        self._files = files
        self._ended = ended
        self._log = log
        self._done: dict[int, tuple[int, bool]] = {}
        self._saved = 0.0

    async def run(self) -> None:
        """Everything that is left to do."""
        batch = self.batch
        try:
            if batch.status == "validating":
                await asyncio.to_thread(self._validate)
            if batch.status in ("in_progress", "cancelling"):
                await self._ask_rows()
            if batch.status == "finalizing":
                batch.output_file_id, batch.error_file_id = await asyncio.to_thread(self._put_in_order, "")
                self._end("completed")
        except OSError as error:  # a full disk, as a rule: what is done stays, and a later server goes on
            self._log.error("batch %s stands still: %s", batch.id, error)
            raise
        finally:
            self._folder.unlock()

    # --- before ---

    def _validate(self) -> None:
        batch, models, seen = self.batch, dict[str, str](), set[str]()
        for number, line in self._folder.rows():
            try:
                if number >= MAX_ROWS:
                    raise RowRefused("too_many_rows", f"a batch has at most {MAX_ROWS} rows.")
                row = parse_row(line, batch.url)
                if row.custom_id in seen:
                    raise RowRefused("duplicate_custom_id", f"custom_id {row.custom_id!r:.80} was there before.")
                self._check_model(row.model, models)
                seen.add(row.custom_id)
            except RowRefused as error:
                batch.errors.append(_problem(error.code, str(error), error.param, number + 1))
                if len(batch.errors) >= MAX_ERRORS or number >= MAX_ROWS:
                    break
        if not seen and not batch.errors:
            batch.errors.append(
                {"code": "empty_file", "message": "the input has no rows.", "param": None, "line": None}
            )
        if batch.errors:
            return self._end("failed")
        batch.models, batch.num_rows = list(dict.fromkeys(models.values())), len(seen)
        batch.status, batch.began = "in_progress", time.time()
        self._folder.save(batch)
        return None

    def _check_model(self, model: str, models: dict[str, str]) -> None:
        """Raise RowRefused, or note its endpoint."""
        if model in models:
            return
        endpoint = self._asker.endpoint_of(model)
        if not self._asker.may_ask(self.batch.key_id, endpoint):
            raise RowRefused("scope_missing", f"the key of this batch may not ask model {model!r:.140}.", "body.model")
        if not self._asker.has([model]):
            raise RowRefused("model_not_found", f"there is no model {model!r:.140} here.", "body.model")
        models[model] = endpoint

    # --- the rows ---

    async def _ask_rows(self) -> None:
        batch = self.batch
        self._done = await asyncio.to_thread(self._folder.offsets)
        self._count()
        left = self._rows_left()
        asking: set[asyncio.Task[None]] = set()
        row = next(left, None)
        try:
            while row is not None or asking:
                if ending := self._why_end():
                    break
                room = num_rows_at_once(*self._asker.places(batch.models))
                while row is not None and len(asking) < room:
                    asking.add(asyncio.ensure_future(self._ask(*row)))
                    row = next(left, None)
                if asking:
                    over, asking = await asyncio.wait(asking, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in over:
                        task.result()
                else:  # no replica is ready, or others wait
                    await asyncio.sleep(LOOK_EVERY_S)
                await self._save_now_and_then()
            else:  # a row that is left although none is asked any more came back for want of a key
                ending = "" if len(self._done) == batch.num_rows else self._why_end() or "failed"
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        if not ending:
            batch.status = "finalizing"
            self._folder.save(batch)
            return
        batch.output_file_id, batch.error_file_id = await asyncio.to_thread(self._put_in_order, ending)
        self._end(ending)

    def _rows_left(self) -> Iterator[tuple[int, bytes]]:
        return ((number, line) for number, line in self._folder.rows() if number not in self._done)

    def _why_end(self) -> str:
        """expired or cancelled, or "" to go on."""
        if self._folder.cancel_requested:
            self.batch.status = "cancelling"
            return "cancelled"
        if time.time() > self.batch.expires:
            return "expired"
        if not all(self._asker.may_ask(self.batch.key_id, model) for model in self.batch.models):
            why = "the key of this batch is not valid any more, or lost its scope."
            self.batch.errors = [_problem("invalid_api_key", why)]
            return "failed"
        return ""

    async def _ask(self, number: int, line: bytes) -> None:
        batch = self.batch
        row = parse_row(line, batch.url)
        num_tries = num_lost = 0
        while True:
            answer = await self._asker.ask(row, batch.url.removeprefix("/v1/"), batch.owner, batch.key_id)
            num_tries += 1
            num_lost += answer.lost_a_replica
            if answer.status == 401:
                return  # the key was revoked meanwhile: the row was not answered, and the batch ends
            if not answer.may_pass or num_lost >= MAX_LOST:
                break
            await asyncio.sleep(back_off_s(num_tries, answer.retry_after_s))
        result = _result(number, row, answer)
        self._folder.add(result)
        self._done[number] = (-1, result.ok)
        batch.num_completed += result.ok
        batch.num_failed += not result.ok
        batch.prompt_tokens += result.usage[0]
        batch.completion_tokens += result.usage[1]

    def _count(self) -> None:
        """From the results that are kept: what was saved of the counts may be older."""
        batch = self.batch
        batch.num_completed = sum(ok for _, ok in self._done.values())
        batch.num_failed = len(self._done) - batch.num_completed
        usages = [result.usage for result in self._folder.results()]
        batch.prompt_tokens = sum(usage[0] for usage in usages)
        batch.completion_tokens = sum(usage[1] for usage in usages)

    async def _save_now_and_then(self) -> None:
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self._saved = time.monotonic()
            await asyncio.to_thread(self._folder.save, self.batch)

    # --- after ---

    def _put_in_order(self, ending: str) -> tuple[str | None, str | None]:
        """Write the output and the error file, each in the order of the input; None for one without lines."""
        batch, offsets = self.batch, self._folder.offsets()
        answered = sum(ok for _, ok in offsets.values())
        output = self._write("output", self._lines(offsets, ok=True)) if answered else None
        missing = batch.num_rows - answered
        errors = self._write("error", self._lines(offsets, ok=False, ending=ending)) if missing else None
        return output, errors

    def _lines(self, offsets: dict[int, tuple[int, bool]], ok: bool, ending: str = "") -> Iterator[dict[str, Any]]:
        for number, line in self._folder.rows():
            offset, was_ok = offsets.get(number, (-1, False))
            if was_ok != ok:
                continue
            if offset >= 0:
                yield self._folder.result_at(offset).line
            else:
                code = "batch_expired" if ending == "expired" else "batch_cancelled"
                error = {"code": code, "message": f"the batch was {ending or 'ended'} before this row was answered."}
                yield _line(parse_row(line, self.batch.url), None, error)

    def _write(self, kind: str, lines: Iterator[dict[str, Any]]) -> str:
        with self._files.write(self.batch.owner, f"{self.batch.id}_{kind}.jsonl", "batch_output") as (file_id, file):
            for line in lines:
                file.write(json.dumps(line).encode() + b"\n")
        return file_id

    def _end(self, status: str) -> None:
        self.batch.status, self.batch.ended = status, time.time()
        self._folder.save(self.batch)
        self._ended(self.batch)


def _problem(code: str, message: str, param: str | None = None, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def _result(number: int, row: BatchRow, answer: RowAnswer) -> RowResult:
    try:
        body = json.loads(answer.body)
    except ValueError:
        body = {"error": {"message": answer.body.decode(errors="replace"), "type": "server_error"}}
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": body}
    ok = answer.status == 200
    usage = body.get("usage") if ok and isinstance(body, dict) else None
    counted = (_tokens(usage, "prompt_tokens", "input_tokens"), _tokens(usage, "completion_tokens", "output_tokens"))
    return RowResult(number, ok, _line(row, response, None), counted)


def _tokens(usage: Any, *names: str) -> int:
    found = [usage[name] for name in names if isinstance(usage, dict) and isinstance(usage.get(name), int)]
    return found[0] if found else 0


def _line(row: BatchRow, response: dict[str, Any] | None, error: dict[str, str] | None) -> dict[str, Any]:
    line_id = f"batch_req_{secrets.token_hex(12)}"
    return {"id": line_id, "custom_id": row.custom_id, "response": response, "error": error}
