"""An answer's text while it is written: what of it is content, what is reasoning, and what calls a tool."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jupyter_llmcloud.inference.openai.chat.tool_formats import Call, Parameters, ToolFormat
from jupyter_llmcloud.inference.openai.detokenize import overlap

THINK = ("<think>", "</think>")
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class CallDelta(NamedTuple):
    """More of a call: which one, its id and name with the first piece, then its arguments."""

    number: int
    id: str | None
    name: str | None
    arguments: str


class Delta(NamedTuple):
    """What a piece of text adds to a message: one of these."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


class AnswerParser(Protocol):
    """Reads one answer.

    Attributes:
        num_calls: how many calls of tools there were so far.
    """

    num_calls: int

    def feed(self, text: str) -> list[Delta]:
        """What the next piece adds; a tag that is not complete is held back."""
        ...

    def end(self) -> list[Delta]:
        """What was held back, now that nothing more comes."""
        ...


class PlainParser:
    """All of it is content."""

    num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        """The text as it is."""
        return [Delta(text)] if text else []

    def end(self) -> list[Delta]:
        """Nothing was held back."""
        return []


class _CallReader:
    """One call that is written as a JSON object: its name and arguments as soon as they are known."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._text = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._over = False

    def feed(self, text: str) -> str:
        """The arguments that this text adds; `name` is set before the first of them."""
        self._text += text
        if self.name is None:
            found = _HEADER.match(self._text)
            if found is None:
                return ""
            self.name, text = str(json.loads(found[1])), self._text[found.end() :]
        return self._arguments(text)

    def _arguments(self, text: str) -> str:
        for position, character in enumerate(text):
            if self._over:
                return text[:position]
            self._step(character)
        return text

    def _step(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._over = self._depth <= 0


@dataclass
class _Region:
    """What the text belongs to now: content, reasoning or a call."""

    kind: str = "content"
    body: str = ""
    reader: _CallReader | None = None


class TaggedParser:
    """Reads what models of most families write: `<think>` and calls of tools between tags.

    Args:
        tool_format: how calls are written; None when no tool was offered.
        parameters: of the tools.
        thinks: whether the model was taught to reason between `<think>` and `</think>`.
        is_thinking: whether the prompt has opened that already.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        parameters: Parameters | None = None,
        *,
        thinks: bool = False,
        is_thinking: bool = False,
    ) -> None:
        self.num_calls = 0
        self._format = tool_format
        self._parameters = parameters or {}
        self._thinks = thinks
        self._region = _Region("reasoning" if is_thinking else "content")
        self._buffer = ""
        self._space = ""  # at the end of a region, which is dropped when a tag follows
        self._at_start = is_thinking  # of a region behind a tag, where space is dropped
        self._said = False

    def feed(self, text: str) -> list[Delta]:
        """What the next piece adds."""
        self._buffer += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return deltas

    def end(self) -> list[Delta]:
        """What was held back."""
        deltas: list[Delta] = []
        if self._region.kind == "call":
            self._feed_call(self._buffer, deltas)
            self._close_call(deltas, closed=False)
        else:
            self._say(self._buffer, deltas)
        if self._space and self._region.kind == "content" and not self.num_calls:
            deltas.append(Delta(self._space))
        self._buffer = self._space = ""
        return deltas

    # --- one step through the buffer; whether there is another one ---

    def _step(self, deltas: list[Delta]) -> bool:
        if not self._buffer:
            return False
        if self._region.kind == "call":
            return self._step_call(deltas)
        if self._region.kind == "content" and self._begins_bare():
            self._region = _Region("call")
            return True
        tags = self._tags()
        found = [(position, tag) for tag in tags if (position := self._buffer.find(tag)) >= 0]
        if not found:
            held = max((overlap(self._buffer, tag) for tag in tags), default=0)
            self._say(self._buffer[: len(self._buffer) - held], deltas)
            self._buffer = self._buffer[len(self._buffer) - held :]
            return False
        position, tag = min(found)
        self._say(self._buffer[:position], deltas)
        self._buffer = self._buffer[position + len(tag) :]
        self._enter(tag)
        return True

    def _tags(self) -> list[str]:
        if self._region.kind == "reasoning":
            return [THINK[1]]
        tags = [THINK[0]] if self._thinks else []
        return tags + ([self._format.opens] if self._format and self._format.opens else [])

    def _enter(self, tag: str) -> None:
        kind = {THINK[0]: "reasoning", THINK[1]: "content"}.get(tag, "call")
        self._region = _Region(kind)
        if kind == "call" and self._format is not None and self._format.is_json:
            self._region.reader = _CallReader()
        self._space, self._at_start = "", True

    def _begins_bare(self) -> bool:
        """Whether the answer as a whole may be a call: it begins with an object."""
        bare = self._format is not None and not self._format.closes and self._format.name in ("json", "llama")
        return bare and not self._said and self._buffer.lstrip().startswith("{")

    def _say(self, text: str, deltas: list[Delta]) -> None:
        if self._at_start:
            text = text.lstrip()
        if not text:
            return
        text = self._space + text
        self._at_start = False
        if self._format is not None or self._region.kind == "reasoning":
            shown = text.rstrip()
            self._space = text[len(shown) :]
        else:
            shown, self._space = text, ""
        if shown:
            self._said = True
            is_content = self._region.kind == "content"
            deltas.append(Delta(content=shown) if is_content else Delta(reasoning=shown))

    # --- calls ---

    def _step_call(self, deltas: list[Delta]) -> bool:
        closes = self._format.closes if self._format is not None else ""
        position = self._buffer.find(closes) if closes else -1
        if position < 0:
            held = overlap(self._buffer, closes) if closes else 0
            self._feed_call(self._buffer[: len(self._buffer) - held], deltas)
            self._buffer = self._buffer[len(self._buffer) - held :]
            return False
        self._feed_call(self._buffer[:position], deltas)
        self._buffer = self._buffer[position + len(closes) :]
        self._close_call(deltas, closed=True)
        return True

    def _feed_call(self, text: str, deltas: list[Delta]) -> None:
        self._region.body += text
        reader = self._region.reader
        if reader is None or not text:
            return
        was_named = reader.name is not None
        arguments = reader.feed(text)
        if reader.name is None:
            return
        if not was_named:
            deltas.append(Delta(call=CallDelta(self.num_calls, self._new_id(), reader.name, "")))
        if arguments:
            deltas.append(Delta(call=CallDelta(self.num_calls, None, None, arguments)))

    def _close_call(self, deltas: list[Delta], *, closed: bool) -> None:
        assert self._format is not None
        region, self._region = self._region, _Region()
        self._at_start = True
        if region.reader is not None and region.reader.name is not None:
            self.num_calls += 1
            return
        calls = self._format.read(region.body, self._parameters)
        if calls is None:  # it looked like a call, and is none: nothing of an answer is lost
            opens = self._format.opens if self._format.name != "llama" else ""
            deltas.append(Delta(content=f"{opens}{region.body}{self._format.closes if closed else ''}"))
            return
        for call in calls:
            deltas += self.whole_call(call)

    def whole_call(self, call: Call) -> list[Delta]:
        """A call that was read at once."""
        index, self.num_calls = self.num_calls, self.num_calls + 1
        return [
            Delta(call=CallDelta(index, self._new_id(), call.name, "")),
            Delta(call=CallDelta(index, None, None, call.arguments)),
        ]

    def _new_id(self) -> str:
        length = self._format.id_length if self._format is not None else 29
        return new_call_id(length)


def new_call_id(length: int = 29) -> str:
    """An id for a call: `call_` and 24 letters and digits, or as many as a family's template insists on."""
    digits = uuid.uuid4().hex
    return digits[:length] if length < 16 else f"call_{digits[: length - 5]}"


class TemplateParser:
    """Reads an answer by the response template that a tokenizer has of its own.

    Args:
        parser: a `transformers` ResponseParser, which has read the prompt already.
    """

    _REASONING = ("thinking", "reasoning", "reasoning_content")

    def __init__(self, parser: Any) -> None:
        self.num_calls = 0
        self._parser: Any = parser
        self._raw = ""

    def feed(self, text: str) -> list[Delta]:
        """What the next piece adds."""
        if self._parser is None:
            return [Delta(text)] if text else []
        self._raw += text
        try:
            return self._read(self._parser.feed(text))
        except Exception:  # a template is a program of others: what it cannot read is shown as it is
            self._parser = None
            return [Delta(text)]

    def end(self) -> list[Delta]:
        """What was held back."""
        if self._parser is None:
            return []
        try:
            _, events = self._parser.finalize()
            return self._read(events)
        except Exception:
            self._parser = None
            return [] if self._shown else [Delta(self._raw)]

    _shown = False

    def _read(self, events: Sequence[dict[str, Any]]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            field = event["field"]
            if event["type"] == "region_chunk" and field == "content":
                deltas.append(Delta(content=event["text"]))
            elif event["type"] == "region_chunk" and field in self._REASONING:
                deltas.append(Delta(reasoning=event["text"]))
            elif event["type"] == "region_close" and field in ("tool_calls", "tool_call"):
                deltas += self._calls(event["value"])
        self._shown = self._shown or bool(deltas)
        return deltas

    def _calls(self, value: Any) -> list[Delta]:
        deltas = []
        for entry in value if isinstance(value, list) else [value]:
            function = entry.get("function", entry)
            arguments = function.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            deltas.append(Delta(call=CallDelta(self.num_calls, new_call_id(), str(function["name"]), "")))
            deltas.append(Delta(call=CallDelta(self.num_calls, None, None, text)))
            self.num_calls += 1
        return deltas
