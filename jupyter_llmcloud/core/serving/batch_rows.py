"""The rows of a batch: what a line of its input must be, and how many rows are asked at a time.

The lines are those of OpenAI's Batch API: {"custom_id", "method": "POST", "url": "/v1/...", "body": {...}}.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

MAX_ROWS = 100_000
MAX_CUSTOM_ID = 512
SHARE = 0.75  # of the places of an endpoint: the rest is there for whoever waits for an answer
MAX_BACK_OFF_S = 30.0
WINDOW = r"^[1-9]\d{0,3}[hm]$"  # how long a batch may take: hours or minutes
WINDOWS = ("24h", "30m")  # as it is written


@dataclass(frozen=True)
class BatchRow:
    """A request of a batch; `body` is what is posted to `url`."""

    custom_id: str
    model: str
    body: dict[str, Any]


class RowRefused(ValueError):
    """A line is no row.

    Attributes:
        code: a short machine-readable reason, such as `duplicate_custom_id`.
        param: the field at fault.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def parse_row(line: bytes, url: str) -> BatchRow:
    """A line of the input of a batch to `url`. Raises RowRefused."""
    try:
        row = _decoded(line)
    except (ValueError, RecursionError) as error:
        raise RowRefused("invalid_json_line", f"the line is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise RowRefused("invalid_json_line", "the line must be a JSON object.")
    if unknown := sorted(set(row) - {"custom_id", "method", "url", "body"}):
        raise RowRefused("unknown_parameter", f"{unknown[0]!r:.80} is not known in a row.", unknown[0][:80])
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise RowRefused("missing_required_parameter", "custom_id must be a text of 1 to 512 characters.", "custom_id")
    if row.get("method", "POST") != "POST":
        raise RowRefused("invalid_method", f"method is {row['method']!r:.40}: it must be POST.", "method")
    if row.get("url") != url:
        raise RowRefused("invalid_url", f"url is {row.get('url')!r:.80}: the batch is one to {url}.", "url")
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise RowRefused("missing_required_parameter", "body must be an object that names its model.", "body.model")
    if body.get("stream"):
        raise RowRefused("unsupported_parameter", "body.stream: a batch has nobody to stream to.", "body.stream")
    return BatchRow(custom_id, body["model"], body)


def _decoded(line: bytes) -> Any:
    """JSON as a request may have it. Python reads more than that: NaN, and halves of characters. Raises ValueError."""
    row = json.loads(line, parse_constant=_finite, parse_float=_finite)
    if b"\\u" in line:
        json.dumps(row, ensure_ascii=False).encode()
    return row


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no number there")
    return number


def num_rows_at_once(num_places: int, num_waiting: int) -> int:
    """How many rows of a batch may be asked at the same time.

    Args:
        num_places: requests that the ready replicas of the endpoint answer at once, all together.
        num_waiting: requests of others that wait for a place: while there are any, no new row begins.
    """
    if num_places <= 0 or num_waiting > 0:
        return 0
    return max(1, int(num_places * SHARE))


def back_off_s(num_tries: int, retry_after_s: float | None) -> float:
    """The wait before a row that could not be answered is asked again, after so many tries."""
    return min(MAX_BACK_OFF_S, max(retry_after_s or 0.0, 0.5 * 2.0 ** min(num_tries, 10)))
