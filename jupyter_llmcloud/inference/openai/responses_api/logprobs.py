"""Which log probabilities belong to the text of a message, where reasoning, tags and calls have some as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jupyter_llmcloud.inference.openai.detokenize import TextPiece


class PendingLogprobs:
    """Those of tokens that came in, until the text that they spell is told.

    Args:
        only_text: whether all of an answer is the text of a message.
    """

    def __init__(self, *, only_text: bool) -> None:
        self._only_text = only_text
        self._num_read = 0  # characters of the answer
        self._tokens: list[tuple[dict[str, Any] | None, bytes]] = []

    def by_token(self, piece: TextPiece, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
        """The text of a piece, cut where its tokens begin, so that it is known whose a text is; each is noted before.

        Args:
            entries: its log probabilities, in the form that responses tell them.
        """
        text, begin = piece.text, 0
        for (_, offset), entry in zip(piece.logprobs, entries, strict=True):
            end = min(offset - self._num_read, len(text))
            if end > begin and not self._only_text:
                yield text[begin:end]
                begin = end
            self._tokens.append((entry, bytes(entry["bytes"])))
        self._num_read += len(text)
        yield text[begin:]

    def told(self, text: str) -> list[dict[str, Any]]:
        """Those of a text that is told now; what came before it was no text, and is left out."""
        spelled = text.encode()
        if self._only_text or (start := b"".join(part for _, part in self._tokens).rfind(spelled)) < 0:
            return self.rest()
        taken: list[dict[str, Any]] = []
        position, end = 0, start + len(spelled)
        while self._tokens and position < end:
            entry, part = self._tokens.pop(0)
            position += len(part)
            if position > start and entry is not None:
                taken.append(entry)
        if position > end:  # more text of the last one is told later
            self._tokens.insert(0, (None, part[len(part) - (position - end) :]))
        return taken

    def rest(self) -> list[dict[str, Any]]:
        """All that are left."""
        left, self._tokens = self._tokens, []
        return [entry for entry, _ in left if entry is not None]
