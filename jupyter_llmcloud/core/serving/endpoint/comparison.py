"""A revision beside the one that answers: the same requests to both, compared by their answers, times and errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STREAM = "text/event-stream"
_TEXT_ROUTES = ("completions", "chat/completions", "responses")
_DIGITS = 4  # to which numbers of a model that generates no text are compared
_OWN = frozenset(
    {
        "id",
        "call_id",
        "created",
        "model",
        "usage",
        "object",
        "system_fingerprint",
        "created_at",
        "completed_at",
        "logprobs",
    }
)
_LAST_OF_RESPONSE = ("response.completed", "response.incomplete")


@dataclass(frozen=True)
class RevisionAnswer:
    """How a revision answered one request.

    Attributes:
        seconds: from when a replica was asked to the last byte of its answer; a shadow has no queue before it.
        failed: by a fault of its own.
        answer: what `read_answer` gives; None when that is not known.
    """

    seconds: float
    failed: bool
    answer: Any = None


@dataclass
class Comparison:
    """What became of the requests that both revisions got.

    Attributes:
        num_compared: requests.
        num_errors: that the tried revision failed; num_stable_errors: that the other one did.
        num_comparable: answers of both to requests that have one answer (greedy ones); num_equal: equal ones.
        seconds: of the answers that both gave, by the tried revision; stable_seconds: by the other one.
    """

    num_compared: int = 0
    num_errors: int = 0
    num_stable_errors: int = 0
    num_comparable: int = 0
    num_equal: int = 0
    seconds: float = 0.0
    stable_seconds: float = 0.0

    def note(self, tried: RevisionAnswer, stable: RevisionAnswer, has_one_answer: bool) -> None:
        """One request was answered by both."""
        self.num_compared += 1
        self.num_errors += tried.failed
        self.num_stable_errors += stable.failed
        if tried.failed or stable.failed:
            return
        self.seconds += tried.seconds
        self.stable_seconds += stable.seconds
        if has_one_answer and tried.answer is not None and stable.answer is not None:
            self.num_comparable += 1
            self.num_equal += tried.answer == stable.answer

    def told(self) -> dict[str, Any]:
        """As shares and ratios; None for what nothing is known of yet."""
        compared, comparable = self.num_compared, self.num_comparable
        return {
            "num_compared": compared,
            "num_comparable": comparable,
            "equal_share": self.num_equal / comparable if comparable else None,
            "latency_ratio": self.seconds / self.stable_seconds if self.stable_seconds else None,
            "error_share": self.num_errors / compared if compared else None,
            "stable_error_share": self.num_stable_errors / compared if compared else None,
        }


def in_words(told: Mapping[str, Any]) -> str:
    """`told` in a line: 97 % of 120 greedy answers equal, 1.20 x the time, 0 % errors (0 %)."""
    dropped = [f"{told['num_dropped']} not copied"] if told.get("num_dropped") else []
    if not told["num_compared"]:
        return ", ".join(["nothing compared yet", *dropped])
    parts = []
    if told["equal_share"] is not None:
        parts.append(f"{told['equal_share']:.0%} of {told['num_comparable']} greedy answers equal")
    if told["latency_ratio"] is not None:
        parts.append(f"{told['latency_ratio']:.2f} x the time")
    parts.append(f"{told['error_share']:.0%} errors ({told['stable_error_share']:.0%} without it)")
    return ", ".join([*parts, *dropped])


def has_one_answer(path: str, body: bytes) -> bool:
    """Whether two revisions with the same weights would answer this request alike: a greedy one, or of no generator."""
    if "/v2/" in path:
        return True
    if not path.endswith(_TEXT_ROUTES):
        return False
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(asked, dict) or asked.get("previous_response_id"):  # which the shadow has never seen
        return False
    temperature = asked.get("temperature")
    return isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0


def read_answer(content_type: str, body: bytes | None) -> Any:
    """What was answered, without what differs from answer to answer (ids, times); None when it cannot be read."""
    if body is None:
        return None
    try:
        if content_type.startswith(STREAM):
            return _of_stream(body)
        return _of_whole(json.loads(body))
    except (ValueError, RecursionError, TypeError, AttributeError):
        return None


def _of_whole(told: Any) -> Any:
    """What a model of the Open Inference Protocol puts out is all its own, whatever its fields are called."""
    if isinstance(told, dict) and "outputs" in told:
        return _plain(told["outputs"], frozenset())
    return _plain(told)


def _of_stream(body: bytes) -> Any:
    """The pieces of each choice put together: how a text was cut into pieces says nothing."""
    texts: dict[tuple[int, str], str] = {}
    for data in re.findall(rb"^data:(.*)$", body, re.MULTILINE):
        if data.strip() == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            return None
        if event.get("type") in _LAST_OF_RESPONSE:
            return _plain(event["response"])
        for choice in event.get("choices") or ():
            number = int(choice.get("index", 0))
            _add(texts, number, {"text": choice.get("text"), **_flat(choice.get("delta") or {})})
    return sorted((number, name, text) for (number, name), text in texts.items()) or None


def _flat(delta: Mapping[str, Any]) -> dict[str, Any]:
    """A delta's own texts, and those of its tool calls."""
    found: dict[str, Any] = {name: value for name, value in delta.items() if isinstance(value, str) and name != "role"}
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        for part in ("name", "arguments"):
            found[f"tool {call.get('index', 0)} {part}"] = function.get(part)
    return found


def _add(texts: dict[tuple[int, str], str], number: int, parts: Mapping[str, Any]) -> None:
    for name, text in parts.items():
        if isinstance(text, str) and text:
            texts[number, name] = texts.get((number, name), "") + text


def _plain(value: Any, own: frozenset[str] = _OWN) -> Any:
    if isinstance(value, dict):
        if "label" in value and "scores" in value:  # a classifier: its scores are never alike to the last digit
            return value["label"]
        return {name: _plain(item, own) for name, item in value.items() if name not in own}
    if isinstance(value, list):
        return [_plain(item, own) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
