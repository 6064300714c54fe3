"""How completions and chat completions word an answer: whole, and in the chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.inference.engines.base import TokenLogprob
from jupyter_llmcloud.inference.openai.chat.answer_parser import AnswerParser, Delta
from jupyter_llmcloud.inference.openai.chat.message_reader import MessageReader, ToldDelta
from jupyter_llmcloud.inference.openai.detokenize import Detokenizer, PlacedLogprob, TextPiece
from jupyter_llmcloud.inference.openai.responses import (
    DONE,
    Envelope,
    TokenUsage,
    chat_logprobs,
    completion_logprobs,
    event,
    openai_object,
)
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary


@dataclass(frozen=True)
class Told:
    """What of an answer a client wants to be told.

    Attributes:
        logprobs: the log probabilities of tokens.
        usage: a last chunk of usage.
        usage_so_far: the usage in every chunk before that, too.
        as_function: a call in the form that calls had before there were tools: one, as `function_call`.
    """

    logprobs: bool = False
    usage: bool = False
    usage_so_far: bool = False
    as_function: bool = False


class _Chunks:
    """The chunks of a stream: what they share, and how it ends."""

    def __init__(self, kind: str, envelope: Envelope, told: Told) -> None:
        self.envelope = envelope
        self.told = told
        self._kind = kind

    def chunk(self, entry: dict[str, Any], usage: TokenUsage) -> bytes:
        """One choice in a chunk."""
        body = openai_object(self._kind, self.envelope, [entry])
        if self.told.usage:
            body["usage"] = usage.body() if self.told.usage_so_far else None
        return event(body)

    def closing(self, usage: TokenUsage) -> bytes:
        """The chunk of usage, where it is wanted, and the end."""
        if not self.told.usage:
            return DONE
        return event({**openai_object(self._kind, self.envelope, []), "usage": usage.body()}) + DONE


@dataclass
class EchoedPrompt:
    """A prompt that is told before its answer: its text, its tokens and where each of them begins."""

    text: str
    tokens: Sequence[int]
    offsets: list[int]

    @classmethod
    def of(cls, vocabulary: Vocabulary, tokens: Sequence[int], text: str | None) -> EchoedPrompt:
        """The prompt of these tokens; `text` as the client wrote it, where it was a text."""
        decoder, offsets, shown = Detokenizer(vocabulary, ()), [], []
        for token in tokens:
            offsets.append(decoder.num_characters)
            shown.append(decoder.step(token))
        shown.append(decoder.rest())
        return cls("".join(shown) if text is None else text, tokens, offsets)


@dataclass
class _TextChoice:
    text: str = ""
    logprobs: list[PlacedLogprob] = field(default_factory=list)
    scored: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    is_begun: bool = False


class CompletionAnswer:
    """POST /v1/completions.

    Args:
        echoed: the prompt of each choice, where it is told too.
    """

    prefix = "cmpl"

    def __init__(
        self, vocabulary: Vocabulary, envelope: Envelope, num_choices: int, told: Told,
        echoed: Sequence[EchoedPrompt] = (),
    ) -> None:  # fmt: skip
        self.envelope = envelope
        self._told = told
        self._vocabulary = vocabulary
        self._chunks = _Chunks("text_completion", envelope, told)
        self._choices = [_TextChoice() for _ in range(num_choices)]
        self._echoed = echoed

    def opening(self, usage: TokenUsage) -> bytes:
        """A completion begins with its text."""
        return b""

    def piece(self, index: int, piece: TextPiece, usage: TokenUsage) -> bytes:
        """New text in a chunk, and the end of a choice in a chunk of its own."""
        choice = self._choices[index]
        choice.text += piece.text
        choice.logprobs += piece.logprobs
        chunks = b""
        if self._echoed and not choice.is_begun:
            choice.scored = piece.scored
            entry = self._entry(index, self._echoed[index].text, self._prompt_logprobs(index))
            chunks += self._chunks.chunk(entry, usage)
        choice.is_begun = True
        if piece.text or (piece.logprobs and self._told.logprobs):
            chunks += self._chunks.chunk(self._entry(index, piece.text, self._logprobs(index, piece.logprobs)), usage)
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
            chunks += self._chunks.chunk(self._entry(index, "", None), usage)
        return chunks

    def closing(self, usage: TokenUsage) -> bytes:
        """The last events."""
        return self._chunks.closing(usage)

    def whole(self, usage: TokenUsage) -> dict[str, Any]:
        """The whole reply."""
        entries = [self._whole(index, choice) for index, choice in enumerate(self._choices)]
        return {**openai_object("text_completion", self.envelope, entries), "usage": usage.body()}

    def _whole(self, index: int, choice: _TextChoice) -> dict[str, Any]:
        logprobs = self._logprobs(index, choice.logprobs)
        if not self._echoed:
            return self._entry(index, choice.text, logprobs)
        prompt = self._prompt_logprobs(index)
        if prompt is not None and logprobs is not None:
            logprobs = {name: prompt[name] + values for name, values in logprobs.items()}
        return self._entry(index, self._echoed[index].text + choice.text, logprobs)

    def _entry(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        reason = self._choices[index].finish_reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, placed: Sequence[PlacedLogprob]) -> dict[str, Any] | None:
        if not self._told.logprobs:
            return None
        return completion_logprobs(self._vocabulary, placed, len(self._echoed[index].text) if self._echoed else 0)

    def _prompt_logprobs(self, index: int) -> dict[str, Any] | None:
        """Those of the prompt's tokens; nothing is before the first one, so it has none."""
        if not self._told.logprobs:
            return None
        prompt, scored = self._echoed[index], self._choices[index].scored
        placed = [PlacedLogprob(entry, at) for entry, at in zip(scored, prompt.offsets[1:], strict=True)]
        told = completion_logprobs(self._vocabulary, placed)
        first = {"tokens": self._vocabulary.name(prompt.tokens[0]), "token_logprobs": None, "top_logprobs": None,
                 "text_offset": 0}  # fmt: skip
        return {name: [first[name], *values] for name, values in told.items()}


@dataclass
class _Message:
    """A message as it grows."""

    reader: MessageReader
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta, logprobs: list[dict[str, Any]]) -> None:
        """What a piece adds."""
        self.logprobs += logprobs
        self.content += delta.content
        self.reasoning += delta.reasoning
        if (call := delta.call) is not None:
            if call.number == len(self.calls):
                self.calls.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}})
            self.calls[call.number]["function"]["arguments"] += call.arguments


class ChatAnswer:
    """POST /v1/chat/completions.

    Args:
        new_parser: makes what reads one choice.
    """

    prefix = "chatcmpl"

    def __init__(
        self, vocabulary: Vocabulary, envelope: Envelope, num_choices: int, told: Told,
        new_parser: Callable[[], AnswerParser],
    ) -> None:  # fmt: skip
        self.envelope = envelope
        self._told = told
        self._vocabulary = vocabulary
        self._chunks = _Chunks("chat.completion.chunk", envelope, told)
        self._messages = [_Message(MessageReader(new_parser())) for _ in range(num_choices)]

    def opening(self, usage: TokenUsage) -> bytes:
        """The role of each choice, before any text."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(index, delta, None, usage) for index in range(len(self._messages)))

    def piece(self, index: int, piece: TextPiece, usage: TokenUsage) -> bytes:
        """New text in chunks, and the end of a choice in a chunk of its own."""
        message = self._messages[index]
        entries = chat_logprobs(self._vocabulary, piece.logprobs) if self._told.logprobs else []
        deltas = message.reader.read(piece, entries)
        if not deltas and (rest := message.reader.rest()):  # of tokens that no text was told of yet
            deltas = [ToldDelta(Delta(), rest)]
        self._note_reasoning(usage)
        chunks = b""
        for delta, logprobs in deltas:
            message.add(delta, logprobs)
            chunks += self._chunk(index, self._told_of(delta), self._logprobs(logprobs) if logprobs else None, usage)
        if piece.finish_reason is not None:
            has_called = message.reader.parser.num_calls and piece.finish_reason == "stop"
            called = "function_call" if self._told.as_function else "tool_calls"
            message.finish_reason = called if has_called else piece.finish_reason
            chunks += self._chunk(index, {}, None, usage)
        return chunks

    def closing(self, usage: TokenUsage) -> bytes:
        """The last events."""
        return self._chunks.closing(usage)

    def whole(self, usage: TokenUsage) -> dict[str, Any]:
        """The whole reply."""
        entries = [self._whole(index, message) for index, message in enumerate(self._messages)]
        return {**openai_object("chat.completion", self.envelope, entries), "usage": usage.body()}

    def _whole(self, index: int, message: _Message) -> dict[str, Any]:
        told: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reasoning:
            told["reasoning_content"] = message.reasoning
        if message.calls:
            calls = (
                {"function_call": message.calls[0]["function"]}
                if self._told.as_function
                else {"tool_calls": message.calls}
            )
            told |= {"content": message.content or None, **calls}
        return {
            "index": index,
            "message": told,
            "logprobs": self._logprobs(message.logprobs),
            "finish_reason": message.finish_reason,
        }

    def _told_of(self, delta: Delta) -> dict[str, Any]:
        if delta.call is None or not self._told.as_function:
            return _told(delta)
        if delta.call.number:
            return {}
        named = {"name": delta.call.name} if delta.call.name is not None else {}
        return {"function_call": {**named, "arguments": delta.call.arguments}}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, usage: TokenUsage) -> bytes:
        reason = self._messages[index].finish_reason
        entry = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunks.chunk(entry, usage)

    def _logprobs(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": list(entries), "refusal": None} if self._told.logprobs else None

    def _note_reasoning(self, usage: TokenUsage) -> None:
        counts = [count for message in self._messages if (count := message.reader.num_reasoning) is not None]
        usage.num_reasoning = sum(counts) if counts else None


def _told(delta: Delta) -> dict[str, Any]:
    if (call := delta.call) is not None:
        function: dict[str, Any] = {"arguments": call.arguments}
        if call.name is None:
            return {"tool_calls": [{"index": call.number, "function": function}]}
        named = {"index": call.number, "id": call.id, "type": "function", "function": {"name": call.name, **function}}
        return {"tool_calls": [named]}
    if delta.reasoning:
        return {"reasoning_content": delta.reasoning}
    return {"content": delta.content} if delta.content else {}
