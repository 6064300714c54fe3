"""Files and batches of `/llmcloud/v1`, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from jupyter_llmcloud.core.serving.batch_rows import WINDOW, WINDOWS
from jupyter_llmcloud.protocol.http.base import Body, Query, Response

Time = Annotated[int, Meta(description="Seconds since the epoch.")]


class PageQuery(Query, frozen=True):
    """Which part of a list, the newest first."""

    limit: Annotated[int, Meta(ge=1, le=10_000, description="How many at most.")] = 100
    after: Annotated[str, Meta(description="Begin behind the one with this id.")] = ""


class FilesQuery(PageQuery, frozen=True):
    """Which files, and which part of their list."""

    order: Annotated[Literal["desc", "asc"], Meta(description="desc: the newest first.")] = "desc"
    purpose: Annotated[str, Meta(description="Only files that were made for this.")] = ""


class File(Response, frozen=True):
    """A file that was uploaded, or that a batch has written."""

    id: str
    bytes: Annotated[int, Meta(description="Its size.")]
    created_at: Time
    filename: str
    purpose: Annotated[str, Meta(description="batch or batch_output.")]
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class Files(Response, frozen=True):
    """Files, in the order that was asked for."""

    data: list[File]
    has_more: bool = False
    object: Literal["list"] = "list"


class FileDeleted(Response, frozen=True):
    """The file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class CreateBatch(Body, frozen=True):
    """A batch to begin."""

    input_file_id: Annotated[str, Meta(description="A file of rows: {custom_id, method, url, body} a line.")]
    endpoint: Annotated[
        str, Meta(description="What every row is posted to.", examples=["/v1/completions", "/v1/chat/completions"])
    ]
    completion_window: Annotated[
        str,
        Meta(
            pattern=WINDOW,
            description="What is not answered by then is given up: hours or minutes.",
            examples=[*WINDOWS],
        ),
    ] = "24h"
    metadata: Annotated[dict[str, str], Meta(max_length=16, description="To tell it from others.")] = {}


class BatchCounts(Response, frozen=True):
    """How many of its rows."""

    total: int
    completed: int
    failed: int


class BatchProblem(Response, frozen=True):
    """What is wrong with a line of the input."""

    code: str
    message: str
    param: str | None = None
    line: Annotated[int | None, Meta(description="From 1.")] = None


class BatchProblems(Response, frozen=True):
    """Why a batch was not begun."""

    data: list[BatchProblem]
    object: Literal["list"] = "list"


class BatchUsage(Response, frozen=True):
    """Tokens over all rows that were answered."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class Batch(Response, frozen=True):
    """A batch: requests that are answered beside those of people who wait, and in the order of its input."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    created_at: Time
    expires_at: Time
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, Any]
    output_file_id: Annotated[str | None, Meta(description="Of the rows that were answered, in order.")] = None
    error_file_id: Annotated[str | None, Meta(description="Of the rows that were not, in order.")] = None
    errors: BatchProblems | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    object: Literal["batch"] = "batch"


class Batches(Response, frozen=True):
    """Batches, the newest first."""

    data: list[Batch]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False
    object: Literal["list"] = "list"
