"""Reads answers in harmony, the format of gpt-oss: messages in channels, each with a header.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.name <|constrain|>json
<|message|>{...}<|call|>`: analysis is reasoning, a recipient makes a call, all else is content
(https://cookbook.openai.com/articles/openai-harmony).
"""

from __future__ import annotations

import re

from jupyter_llmcloud.inference.openai.chat.answer_parser import CallDelta, Delta, SteppingParser, new_call_id
from jupyter_llmcloud.inference.openai.detokenize import overlap

_MESSAGE = "<|message|>"
_START = "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START, "<|channel|>")
TAGS = (*_ENDS, _MESSAGE, "<|constrain|>")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTIONS = "functions."


def is_harmony(template: str | None) -> bool:
    """Whether a chat template writes this format."""
    return template is not None and "<|channel|>" in template and _MESSAGE in template


class HarmonyParser(SteppingParser):
    """One answer.

    Args:
        prompt: before the answer; what follows its last `<|start|>` has begun the first header, or even its message.
        tools: the names of those that were offered.
    """

    may_reason = True

    def __init__(self, prompt: str, tools: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._tools = tools
        self._in_header = True
        self._kind = "content"
        begun = prompt.rpartition(_START)[2] if _START in prompt else ""
        self._role = "" if any(tag in begun for tag in _ENDS[:3]) else begun.partition("<|channel|>")[0]
        if self._role:
            self.feed(begun)

    def end(self) -> list[Delta]:
        """What was held back."""
        deltas: list[Delta] = []
        if self._in_header:
            self._kind = "content"
            self._say(self._plain_text(), deltas)
        else:
            self._say(self._buffer, deltas)
            self._close()
        self._buffer, self._in_header = "", True
        return deltas

    def _step(self, deltas: list[Delta]) -> bool:
        if self._in_header:
            before, found, after = self._buffer.partition(_MESSAGE)
            if not found:
                return False
            self._open(before, deltas)
            self._in_header, self._buffer = False, after
            return True
        places = [(place, tag) for tag in _ENDS if (place := self._buffer.find(tag)) >= 0]
        if not places:
            held = max(overlap(self._buffer, tag) for tag in _ENDS)
            self._say(self._buffer[: len(self._buffer) - held], deltas)
            self._buffer = self._buffer[len(self._buffer) - held :]
            return False
        place, tag = min(places)
        self._say(self._buffer[:place], deltas)
        self._close()
        # A header that begins without <|start|> keeps its channel.
        self._buffer = self._buffer[place if tag == "<|channel|>" else place + len(tag) :]
        self._in_header = True
        return True

    def _open(self, header: str, deltas: list[Delta]) -> None:
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = recipient[1].removeprefix(_FUNCTIONS) if recipient else ""
        if name and (name in self._tools or (recipient and recipient[1].startswith(_FUNCTIONS) and self._tools)):
            self._kind = "call"
            deltas.append(Delta(call=CallDelta(self.num_calls, new_call_id(), name, "")))
        else:
            self._kind = "reasoning" if channel and channel[1] == "analysis" else "content"

    def _close(self) -> None:
        if self._kind == "call":
            self.num_calls += 1
        self._kind = "content"

    def _say(self, text: str, deltas: list[Delta]) -> None:
        if not text:
            return
        if self._kind == "call":
            deltas.append(Delta(call=CallDelta(self.num_calls, None, None, text)))
        else:
            deltas.append(Delta(reasoning=text) if self._kind == "reasoning" else Delta(content=text))

    def _plain_text(self) -> str:
        """A header that no message follows, where it is none: a model that did not keep to the format."""
        text = self._buffer.removeprefix(self._role)
        return "" if any(tag in text for tag in TAGS) or text.strip() == "assistant" else text
