"""An answer's text while it is written: what of it is content, what is reasoning, and what calls a tool."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from jupyter_llmcloud.inference.openai.chat.call_readers import Call, Parameters
from jupyter_llmcloud.inference.openai.chat.tool_formats import ToolFormat
from jupyter_llmcloud.inference.openai.detokenize import overlap

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NEXT = re.compile(r"\s*\}[\s,;]*(?=\{)")  # behind the arguments of a call, where another one follows


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
        may_reason: whether some of it may be reasoning.
    """

    num_calls: int
    may_reason: bool

    def feed(self, text: str) -> list[Delta]:
        """What the next piece adds; a tag that is not complete is held back."""
        ...

    def end(self) -> list[Delta]:
        """What was held back, now that nothing more comes."""
        ...


class PlainParser:
    """All of it is content."""

    num_calls = 0
    may_reason = False

    def feed(self, text: str) -> list[Delta]:
        """The text as it is."""
        return [Delta(text)] if text else []

    def end(self) -> list[Delta]:
        """Nothing was held back."""
        return []


class _CallReader:
    """One call that is written as a JSON object: its name and arguments as soon as they are known.

    Attributes:
        behind: what has come behind the arguments.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_over = False
        self.behind = ""
        self._text = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def is_within(self) -> bool:
        """Whether its arguments are begun and not finished."""
        return self.name is not None and not self.is_over

    def feed(self, text: str) -> str:
        """The arguments that this text adds; `name` is set before the first of them."""
        if self.name is None:
            self._text += text
            found = _HEADER.match(self._text)
            if found is None:
                return ""
            self.name, text = _unquoted(found[1]), self._text[found.end() :]
        return self._arguments(text)

    def _arguments(self, text: str) -> str:
        for position, character in enumerate(text):
            if self.is_over:
                self.behind += text[position:]
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
            self.is_over = self._depth <= 0


def _unquoted(name: str) -> str:
    return str(json.loads(name)).encode(errors="replace").decode()


@dataclass
class _Region:
    """What the text belongs to now: content, reasoning or a call.

    Attributes:
        body: of a call, so far.
        before: what stood before it and is no content, unless it turns out to be no call: space, and what opened it.
        num_tried: characters that the reader has seen behind a tag that may close the call or be part of it.
    """

    kind: str = "content"
    body: str = ""
    before: str = ""
    reader: _CallReader | None = None
    num_tried: int | None = None


class SteppingParser(ABC):
    """Reads step by step what has come so far."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._buffer = ""

    def feed(self, text: str) -> list[Delta]:
        """What the next piece adds."""
        self._buffer += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return deltas

    @abstractmethod
    def end(self) -> list[Delta]:
        """What was held back, now that nothing more comes."""

    @abstractmethod
    def _step(self, deltas: list[Delta]) -> bool:
        """Read on in the buffer; returns whether there may be more to read."""


class TaggedParser(SteppingParser):
    """Reads what models of most families write: reasoning and calls of tools, each between tags.

    Args:
        tool_format: how calls are written; None when no tool was offered.
        parameters: of the tools.
        think: the tags of reasoning, for a model that was taught to reason between them.
        is_thinking: whether the prompt has opened that already.
        is_forced: whether the answer can be nothing but calls: what is cut before it names a tool is then no content.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        parameters: Parameters | None = None,
        *,
        think: tuple[str, str] | None = None,
        is_thinking: bool = False,
        is_forced: bool = False,
    ) -> None:
        super().__init__()
        self._is_forced = is_forced
        self._format = tool_format
        self._parameters = parameters or {}
        self._think = think
        self.may_reason = think is not None
        self._region = _Region("reasoning" if is_thinking else "content")
        self._space = ""  # at the end of a region, which is dropped when a tag follows
        self._at_start = is_thinking  # of a region behind a tag, where space is dropped
        self._said = False

    def end(self) -> list[Delta]:
        """What was held back."""
        deltas: list[Delta] = []
        while self._region.kind == "call" and self._end_call(deltas):
            while self._step(deltas):
                pass
        if self._region.kind == "content" and self._is_forced:
            self._buffer = ""  # the beginning of a tag
        if self._region.kind != "call":
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
            self._region = _Region("call", before=self._space)
            self._space = ""
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
            return [self._think[1]] if self._think else []
        tags = [self._think[0]] if self._think else []
        return tags + ([self._format.opens] if self._format and self._format.opens else [])

    def _enter(self, tag: str) -> None:
        if self._think and tag in self._think:
            self._region = _Region("reasoning" if tag == self._think[0] else "content")
        else:
            reader = _CallReader() if self._format is not None and self._format.is_json else None
            self._region = _Region("call", before=self._space + tag, reader=reader)
        self._space, self._at_start = "", True

    def _begins_bare(self) -> bool:
        """Whether the answer as a whole may be a call: it begins as one does."""
        begins = self._format.bare if self._format is not None and not self._said else ""
        first = self._buffer.lstrip()[:1]
        return first != "" and first in begins

    def _say(self, text: str, deltas: list[Delta]) -> None:
        if self._at_start:
            text = text.lstrip()
        if not text:
            return
        text = self._space + text
        self._at_start = False
        if self._format is not None or self._think is not None:
            shown = text.rstrip()
            self._space = text[len(shown) :]
        else:
            shown, self._space = text, ""
        if shown:
            is_content = self._region.kind == "content"
            self._said = self._said or is_content
            deltas.append(Delta(content=shown) if is_content else Delta(reasoning=shown))

    # --- calls ---

    def _step_call(self, deltas: list[Delta]) -> bool:
        region = self._region
        if region.num_tried is not None:
            return self._step_doubtful(region.num_tried, deltas)
        closes = self._format.closes if self._format is not None else ""
        position = self._buffer.find(closes) if closes else -1
        if position < 0:
            held = overlap(self._buffer, closes) if closes else 0
            self._feed_call(self._buffer[: len(self._buffer) - held], deltas)
            self._buffer = self._buffer[len(self._buffer) - held :]
            return False
        self._feed_call(self._buffer[:position], deltas)
        self._buffer = self._buffer[position:]
        if region.reader is not None and region.reader.is_within:
            region.num_tried = 0
        else:
            self._buffer = self._buffer[len(closes) :]
            self._close_call(deltas, closes)
        return True

    def _step_doubtful(self, num_tried: int, deltas: list[Delta]) -> bool:
        """A tag that closes came within the arguments: it belongs to them if they are ever finished.

        An agent that writes code about tools has such a tag inside a string. It is held back until that is known.
        """
        region = self._region
        assert region.reader is not None
        taken = region.reader.feed(self._buffer[num_tried:])
        if not region.reader.is_over:
            region.num_tried = len(self._buffer)
            return False
        end, region.num_tried, region.reader.behind = num_tried + len(taken), None, ""
        deltas.append(Delta(call=CallDelta(self.num_calls, None, None, self._buffer[:end])))
        self._buffer = self._buffer[end:]
        return True

    def _end_call(self, deltas: list[Delta]) -> bool:
        """The answer is at its end within a call; whether text is left that is no part of it."""
        closes = self._format.closes if self._format is not None else ""
        position = self._buffer.find(closes) if closes else -1
        text, self._buffer = (self._buffer, "") if position < 0 else (
            self._buffer[:position], self._buffer[position + len(closes) :]
        )  # fmt: skip
        self._feed_call(text, deltas)
        self._close_call(deltas, closes if position >= 0 else "")
        return bool(self._buffer)

    def _feed_call(self, text: str, deltas: list[Delta]) -> None:
        region = self._region
        region.body += text
        while (reader := region.reader) is not None and text:
            was_named = reader.name is not None
            arguments = reader.feed(text)
            if reader.name is None:
                return
            if not was_named:
                deltas.append(Delta(call=CallDelta(self.num_calls, self._new_id(), reader.name, "")))
            if arguments:
                deltas.append(Delta(call=CallDelta(self.num_calls, None, None, arguments)))
            if (found := _NEXT.match(reader.behind)) is None:
                return
            # Several calls between one pair of tags, which templates do not show, but models write.
            self.num_calls += 1
            text = reader.behind[found.end() :]
            region.reader, region.body, region.before = _CallReader(), text, ""

    def _close_call(self, deltas: list[Delta], closed_by: str) -> None:
        assert self._format is not None
        region, self._region = self._region, _Region()
        if region.reader is not None and region.reader.name is not None:
            self.num_calls += 1
            self._at_start = True
            return
        calls = self._format.read(region.body, self._parameters)
        if calls is None and self._is_forced and not closed_by:
            return
        if calls is None:  # it looked like a call, and is none: nothing of an answer is lost
            self._say_again(f"{region.before}{region.body}{closed_by}", deltas)
            return
        self._at_start = True
        for call in calls:
            deltas += self.whole_call(call)

    def _say_again(self, text: str, deltas: list[Delta]) -> None:
        """Content that was held for a call."""
        self._at_start = False
        self._say(text, deltas)
        self._said = True

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
