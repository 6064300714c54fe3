"""`/llmcloud/v1/files` and `/llmcloud/v1/batches`: OpenAI's Batch API over the endpoints of this server.

A key sees what it made, a Jupyter user everything.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tornado import httputil, web

from jupyter_llmcloud.core.serving.content_encoding import decoded
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.http.openai.batches import (
    Batch,
    BatchCounts,
    Batches,
    BatchProblem,
    BatchProblems,
    BatchUsage,
    CreateBatch,
    File,
    FileDeleted,
    Files,
    FilesQuery,
    PageQuery,
)
from jupyter_llmcloud.server.api.base import length_of
from jupyter_llmcloud.server.gateway.auth import GatewayHandler
from jupyter_llmcloud.server.gateway.operation import gateway_operation

if TYPE_CHECKING:
    from jupyter_llmcloud.server.batches.batches import BatchRegistry
    from jupyter_llmcloud.storage.serving.batches import StoredBatch
    from jupyter_llmcloud.storage.serving.uploads import StoredFile

MAX_UPLOAD = 64 << 20
BODY_TIMEOUT_S = 300.0
CHUNK = 1 << 18
_SECONDS = {"m": 60, "h": 3600}


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_Named)


class BatchesBase(GatewayHandler):
    """What the routes of files and batches share."""

    def initialize(self, batches: BatchRegistry, **shared: Any) -> None:  # type: ignore[override]
        """`batches` are those of this server."""
        super().initialize(**shared)
        self.batches = batches

    @property
    def owner(self) -> str | None:
        """Whose things may be seen; None: everybody's."""
        return self.actor if self.key is not None else None

    def require_infer(self) -> None:
        """Raise 403 for a key that opens no endpoint."""
        if self.key is not None and not any(scope.startswith("infer:") for scope in self.key.scopes):
            raise ApiError(403, f"key {self.key.id} opens no endpoint.", code="scope_missing")


@web.stream_request_body
class FilesHandler(BatchesBase):
    """All files."""

    async def prepare(self) -> None:  # type: ignore[override]
        """Refuse what can be refused before the body is read."""
        connection: Any = self.request.connection
        connection.set_max_body_size(2 * MAX_UPLOAD)
        connection.set_body_timeout(BODY_TIMEOUT_S)
        self._content = bytearray()
        self._num_bytes = 0
        await super().prepare()
        length = length_of(self.request.headers.get("Content-Length", "0"))
        if length is None or length > MAX_UPLOAD:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        message = f"a file may have {MAX_UPLOAD} bytes: send the rows in several batches."
        return ApiError(413, message, code="request_too_large")

    def data_received(self, chunk: bytes) -> None:
        """Collect the body, up to the limit."""
        self._num_bytes += len(chunk)
        if self._num_bytes <= MAX_UPLOAD:
            self._content += chunk

    @gateway_operation("read", Files, query=FilesQuery)
    async def get(self, query: FilesQuery) -> Files:
        """List the files, the newest first unless it is asked otherwise."""
        files = await asyncio.to_thread(self.batches.list_files, self.owner)
        wanted = [file for file in files if query.purpose in ("", file.purpose)]
        found, more = _page(wanted[::-1] if query.order == "asc" else wanted, query)
        return Files(data=[as_file(file) for file in found], has_more=more)

    @gateway_operation("execute", File, body="multipart/form-data")
    async def post(self) -> File:
        """Upload a file: the fields `file` and `purpose`, which is batch."""
        self.require_infer()
        if self._num_bytes > MAX_UPLOAD:
            raise self._too_large()
        filename, content = self._uploaded()
        return as_file(await asyncio.to_thread(self._keep, filename, content))

    def _uploaded(self) -> tuple[str, bytes]:
        fields: dict[str, list[bytes]] = {}
        files: dict[str, list[httputil.HTTPFile]] = {}
        kind = self.request.headers.get("Content-Type", "")
        if not kind.startswith("multipart/form-data"):
            raise UsageError(f"Content-Type is {kind!r:.80}: a file is uploaded as multipart/form-data.")
        try:
            httputil.parse_body_arguments(kind, self._form(), fields, files)
        except (httputil.HTTPInputError, ValueError) as error:
            raise UsageError(f"the form cannot be read: {error}.") from None
        purpose = b"".join(fields.get("purpose", [])).decode(errors="replace")
        if purpose != "batch":
            raise ApiError(400, f"purpose is {purpose!r:.40}: it must be batch.", param="purpose", code="invalid_value")
        if others := sorted((fields.keys() | files.keys()) - {"file", "purpose"}):
            name = others[0].partition("[")[0][:80]  # expires_after[seconds]
            message = f"field {name!r} is not known here: file, purpose are."
            raise ApiError(400, message, param=name, code="unsupported_parameter")
        if len(files.get("file", [])) != 1:
            raise ApiError(400, "the form needs one field `file` with a file name.", param="file")
        [file] = files["file"]
        return Path(str(file.filename)).name[:255] or "input.jsonl", bytes(file.body)

    def _form(self) -> bytes:
        return decoded(bytes(self._content), self.request.headers.get("Content-Encoding", ""), MAX_UPLOAD)

    def _keep(self, filename: str, content: bytes) -> StoredFile:
        with self.batches.files.write(self.actor, filename, "batch") as (file_id, file):
            file.write(content)
        return self.batches.files.find(file_id)


class FileHandler(BatchesBase):
    """One file, by its id."""

    @gateway_operation("read", File)
    async def get(self, name: str) -> File:
        """Tell of a file."""
        return as_file(self.batches.file(name, self.owner))

    @gateway_operation("execute", FileDeleted)
    async def delete(self, name: str) -> FileDeleted:
        """Delete a file. A batch that was begun with it goes on."""
        self.batches.file(name, self.owner)
        await asyncio.to_thread(self.batches.files.delete, name)
        return FileDeleted(id=name)


class FileContentHandler(BatchesBase):
    """The bytes of one file."""

    @gateway_operation("read", "application/octet-stream")
    async def get(self, name: str) -> None:
        """Download a file."""
        self.batches.file(name, self.owner)
        self.set_header("Content-Type", "application/octet-stream")
        with self.batches.files.path(name).open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                self.write(chunk)
                await self.flush()
        self.finish(set_content_type="application/octet-stream")


class BatchesHandler(BatchesBase):
    """All batches."""

    @gateway_operation("read", Batches, query=PageQuery)
    async def get(self, query: PageQuery) -> Batches:
        """List the batches, the newest first."""
        found, more = _page(await asyncio.to_thread(self.batches.list, self.owner), query)
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return Batches(data=[as_batch(batch) for batch in found], first_id=first, last_id=last, has_more=more)

    @gateway_operation("execute", Batch, body=CreateBatch)
    async def post(self, body: CreateBatch) -> Batch:
        """Begin a batch: every row of a file is asked, beside those who wait for an answer."""
        self.require_infer()
        window = body.completion_window.rstrip("\n")  # which the pattern lets be
        window_s = int(window[:-1]) * _SECONDS[window[-1]]
        key_id = self.key.id if self.key is not None else None
        return as_batch(
            self.batches.create(self.actor, key_id, body.input_file_id, body.endpoint, window_s, body.metadata)
        )


class BatchHandler(BatchesBase):
    """One batch, by its id."""

    @gateway_operation("read", Batch)
    async def get(self, name: str) -> Batch:
        """Tell how far a batch is."""
        return as_batch(self.batches.batch(name, self.owner))


class BatchCancelHandler(BatchesBase):
    """The end of a batch before its time."""

    @gateway_operation("execute", Batch)
    async def post(self, name: str) -> Batch:
        """Cancel a batch; what was answered is kept."""
        return as_batch(self.batches.cancel(name, self.owner, self.actor))


def _page(items: list[Item], query: PageQuery) -> tuple[list[Item], bool]:
    if query.after:
        behind = next((number for number, item in enumerate(items) if item.id == query.after), len(items))
        items = items[behind + 1 :]
    return items[: query.limit], len(items) > query.limit


def as_file(file: StoredFile) -> File:
    """A file in OpenAI's words."""
    return File(
        id=file.id, bytes=file.bytes, created_at=int(file.created), filename=file.filename, purpose=file.purpose
    )


def as_batch(batch: StoredBatch) -> Batch:
    """A batch in OpenAI's words."""
    ended: dict[str, Any] = {} if batch.ended is None else {f"{batch.status}_at": int(batch.ended)}
    errors = [BatchProblem(**problem) for problem in batch.errors]
    window_m = round((batch.expires - batch.created) / 60)
    return Batch(
        id=batch.id,
        endpoint=batch.url,
        input_file_id=batch.input_file_id,
        completion_window=f"{window_m}m" if window_m % 60 else f"{window_m // 60}h",
        status=batch.status,  # type: ignore[arg-type]
        created_at=int(batch.created),
        expires_at=int(batch.expires),
        in_progress_at=None if batch.began is None else int(batch.began),
        request_counts=BatchCounts(total=batch.num_rows, completed=batch.num_completed, failed=batch.num_failed),
        usage=BatchUsage(
            input_tokens=batch.prompt_tokens,
            output_tokens=batch.completion_tokens,
            total_tokens=batch.prompt_tokens + batch.completion_tokens,
        ),
        metadata=batch.metadata,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        errors=BatchProblems(data=errors) if errors else None,
        **ended,
    )
