"""Texts that cannot fit, known from their beginning: to tokenize all of one would take long for nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.loading import LoadedModel

MIN_PIECE = 4096  # characters
SHORT = 3  # pieces: what is no longer is tokenized as a whole at once
# Tokens that a piece has by itself and the same characters within their text have not. Tokens reach over a few
# characters only, but WordPiece makes one token of a word of more than 100 or 200, and very many of half of it.
MAX_EDGE = 256
# A message that a template shows takes a token at least, the more so with its role; twice that leaves no doubt.
_MESSAGES_PER_TOKEN = 2
_SPACES = re.compile(r"\s\s+")


def check_length(text: str, loaded: LoadedModel, param: str) -> None:
    """Refuse a text that is far too long, after its first pieces; raises `ApiError` 400. What fits is never refused."""
    context = loaded.context_length
    if (found := far_too_long(text, loaded.tokenizer, context)) is not None:
        raise _too_long(context, found, param, len(text))


class AtLeast(NamedTuple):
    """So many tokens are in the first characters of a text."""

    num_tokens: int
    num_characters: int


def far_too_long(text: str, tokenizer: Any, limit: int) -> AtLeast | None:
    """What the beginning of a text has, where that alone is more tokens than `limit`; None: it may fit."""
    size = max(MIN_PIECE, 2 * limit)
    if len(text) <= SHORT * size:
        return None
    at_least, num_read = 0, 0
    for piece in pieces_of(text, size):
        num_read += len(piece)
        at_least += max(0, _num_tokens(tokenizer, piece) - MAX_EDGE)
        if at_least > limit:
            return AtLeast(at_least, num_read)
    return None


def are_too_many(num_messages: int, loaded: LoadedModel) -> bool:
    """Whether so many messages that say something cannot fit, where a template shows each of them."""
    return num_messages > _MESSAGES_PER_TOKEN * loaded.context_length


def too_many(num_messages: int, loaded: LoadedModel, param: str) -> ApiError:
    """The refusal of so many messages."""
    context = loaded.context_length
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens, but {param} has {num_messages} entries, each of "
        "which takes one at least. Shorten it.",
        param=param,
        code="context_length_exceeded",
    )


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a text."""
    # The length is judged afterwards, by a 400: the tokenizer's own warning would fill the log.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def pieces_of(text: str, size: int) -> Iterator[str]:
    """A text in pieces of about so many characters, cut before white space where there is some."""
    start = 0
    while start < len(text):
        end = _end_of_piece(text, start + size)
        yield text[start:end]
        start = end


def _end_of_piece(text: str, end: int) -> int:
    if end >= len(text):
        return len(text)
    found = max(text.rfind(space, end - MAX_EDGE, end) for space in (" ", "\n", "\t"))
    return found if found >= 0 else end


def _num_tokens(tokenizer: Any, piece: str) -> int:
    if _takes_spaces_in(tokenizer):
        piece = _SPACES.sub(" ", piece)
    return len(encode(tokenizer, piece, special=False))


def _takes_spaces_in(tokenizer: Any) -> bool:
    """Whether a special token may stand for all the white space beside it as well, however much that is."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    return any(token.lstrip or token.rstrip for token in known.values())


def _too_long(context: int, found: AtLeast, param: str, length: int) -> ApiError:
    told = f"{param} has at least {found.num_tokens} in the first {found.num_characters} of its {length} characters"
    return ApiError(
        400,
        f"This model's maximum context length is {context} tokens, but {told}. Shorten it.",
        param=param,
        code="context_length_exceeded",
    )
