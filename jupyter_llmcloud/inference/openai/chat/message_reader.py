"""Reads an answer, and knows which of its tokens are the text of the message, and how many are reasoning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jupyter_llmcloud.inference.openai.chat.answer_parser import AnswerParser, Delta, PlainParser
from jupyter_llmcloud.inference.openai.detokenize import TextPiece


class ToldDelta(NamedTuple):
    """What a piece adds to a message, and the log probabilities of its tokens when that is content."""

    delta: Delta
    logprobs: list[dict[str, Any]]


class MessageReader:
    """Reads one answer.

    Attributes:
        parser: tells content, reasoning and calls apart.
        num_reasoning: tokens of reasoning so far; None where there can be none.
    """

    def __init__(self, parser: AnswerParser) -> None:
        self.parser = parser
        self.num_reasoning: int | None = 0 if parser.may_reason else None
        self._is_plain = isinstance(parser, PlainParser)
        self._num_read = 0  # characters of the answer
        self._undecided: list[int] = []  # characters of each token that has added nothing so far
        self._pending: list[tuple[dict[str, Any] | None, bytes]] = []  # tokens whose text is not told yet

    def read(self, piece: TextPiece, entries: Sequence[dict[str, Any]]) -> list[ToldDelta]:
        """What a piece adds.

        Args:
            entries: its log probabilities, as chat completions and responses tell them; none where nobody wants them.
        """
        told: list[ToldDelta] = []
        for text in self._by_token(piece, entries):
            self._note(self.parser.feed(text), told)
        if piece.finish_reason is not None:
            self._note(self.parser.end(), told)
        return told

    def rest(self) -> list[dict[str, Any]]:
        """Log probabilities of tokens without a text of their own, where all of an answer is the message."""
        return self._all_pending() if self._is_plain else []

    def _by_token(self, piece: TextPiece, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
        """The text of a piece, cut where its tokens begin, so that it is known whose a text is.

        A token is noted before its text.
        """
        text, begin = piece.text, 0
        is_cut = not self._is_plain and (bool(entries) or self.num_reasoning is not None)
        for number, offset in enumerate(piece.offsets):
            end = min(offset - self._num_read, len(text))
            if end > begin and is_cut:
                yield self._of_last(text[begin:end])
                begin = end
            self._undecided.append(0)
            if number < len(entries):
                self._pending.append((entries[number], bytes(entries[number]["bytes"])))
        self._num_read += len(text)
        yield self._of_last(text[begin:])

    def _of_last(self, text: str) -> str:
        if self._undecided:
            self._undecided[-1] += len(text)
        return text

    def _note(self, deltas: Sequence[Delta], told: list[ToldDelta]) -> None:
        if deltas:
            self._count(deltas)
        for delta in deltas:
            text = delta.content or delta.reasoning
            logprobs = self._logprobs_of(text) if text else []
            last = told[-1].delta if told else Delta()
            if delta.reasoning and last.reasoning:
                told[-1] = ToldDelta(Delta(reasoning=last.reasoning + text), [])
            elif delta.content and last.content:
                told[-1] = ToldDelta(Delta(last.content + text), told[-1].logprobs + logprobs)
            else:
                told.append(ToldDelta(delta, logprobs if delta.content else []))

    def _count(self, deltas: Sequence[Delta]) -> None:
        """Tokens that spell reasoning are such; those before them are a tag, and the last one where more follows."""
        num_characters = sum(len(delta.reasoning) for delta in deltas)
        undecided, self._undecided = self._undecided, []
        if self.num_reasoning is None or not num_characters:
            return
        if undecided and not deltas[-1].reasoning:
            undecided.pop()
        while num_characters > 0 and undecided:
            num_characters -= undecided.pop()
            self.num_reasoning += 1

    def _logprobs_of(self, text: str) -> list[dict[str, Any]]:
        """Those of a text that is told now; what came before it was no text, and is left out."""
        spelled = text.encode()
        if self._is_plain or (start := b"".join(part for _, part in self._pending).rfind(spelled)) < 0:
            return self._all_pending()
        taken: list[dict[str, Any]] = []
        position, end = 0, start + len(spelled)
        while self._pending and position < end:
            entry, part = self._pending.pop(0)
            position += len(part)
            if position > start and entry is not None:
                taken.append(entry)
        if position > end:  # more text of the last one is told later
            self._pending.insert(0, (None, part[len(part) - (position - end) :]))
        return taken

    def _all_pending(self) -> list[dict[str, Any]]:
        left, self._pending = self._pending, []
        return [entry for entry, _ in left if entry is not None]
