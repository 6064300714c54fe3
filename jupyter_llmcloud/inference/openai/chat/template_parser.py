"""Reads an answer by the response template that a tokenizer has of its own (`transformers`' response parsing)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jupyter_llmcloud.inference.openai.chat.answer_parser import CallDelta, Delta, new_call_id

_REASONING = ("thinking", "reasoning", "reasoning_content")
_CALLS = ("tool_calls", "tool_call")


class TemplateParser:
    """One answer.

    A template is a program of others, and a model may write what it cannot read: from there on the text is shown as it
    is, so that nothing of an answer is lost.

    Args:
        parser: a `transformers` ResponseParser, which has read the prompt already.
    """

    may_reason = True

    def __init__(self, parser: Any) -> None:
        self.num_calls = 0
        self._parser: Any = parser
        self._raw = ""
        self._num_read = 0  # characters of it that were told, as text or as calls
        self._call_text = ""  # of the call that is being written

    def feed(self, text: str) -> list[Delta]:
        """What the next piece adds."""
        if self._parser is None:
            return [Delta(text)] if text else []
        self._raw += text
        try:
            events = self._parser.feed(text)
            return self._read(events)
        except Exception:
            return self._give_up()

    def end(self) -> list[Delta]:
        """What was held back."""
        if self._parser is None:
            return []
        try:
            _, events = self._parser.finalize()
            return self._read(events)
        except Exception:
            return self._give_up()

    def _give_up(self) -> list[Delta]:
        self._parser = None
        rest = self._raw[self._num_read :]
        return [Delta(rest)] if rest else []

    def _read(self, events: Sequence[dict[str, Any]]) -> list[Delta]:
        deltas: list[Delta] = []
        num_calls, num_read = self.num_calls, self._num_read
        try:
            for event in events:
                deltas += self._delta(event)
        except Exception:
            self.num_calls, self._num_read = num_calls, num_read
            raise
        return deltas

    def _delta(self, event: dict[str, Any]) -> list[Delta]:
        kind, field = event["type"], event["field"]
        if kind == "region_chunk" and field in _CALLS:
            self._call_text += event["text"]
        elif kind == "region_chunk" and (field == "content" or field in _REASONING):
            self._pass(event["text"])
            return [Delta(content=event["text"]) if field == "content" else Delta(reasoning=event["text"])]
        elif kind == "region_close" and field in _CALLS:
            deltas = self._calls(event["value"])
            self._pass(self._call_text)
            self._call_text = ""
            return deltas
        return []

    def _pass(self, text: str) -> None:
        """The next text of the answer that was told; what stands between such texts are tags."""
        if (found := self._raw.find(text, self._num_read)) >= 0:
            self._num_read = found + len(text)

    def _calls(self, value: Any) -> list[Delta]:
        deltas = []
        for entry in value if isinstance(value, list) else [value]:
            function = entry.get("function", entry)
            arguments, name = function.get("arguments", {}), str(function["name"])
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            f"{name}{text}".encode()  # half of a surrogate pair could not be told
            deltas.append(Delta(call=CallDelta(self.num_calls, new_call_id(), name, "")))
            deltas.append(Delta(call=CallDelta(self.num_calls, None, None, text)))
            self.num_calls += 1
        return deltas
