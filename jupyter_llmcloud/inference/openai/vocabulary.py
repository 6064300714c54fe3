"""What each token of a vocabulary adds to a text, as bytes: a character may be spread over several tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONGEST_CHARACTER = 4
_MAX_ANCHORS = 4096


class Vocabulary:
    """The bytes, names and special tokens of a tokenizer.

    Attributes:
        special: the ids that a text does not show, with their spelling.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special = _special(tokenizer)
        self._alphabet = _alphabet(tokenizer)
        self._anchor: list[int] = [] if self._alphabet else self._plain_token()
        self._before = self._decode(self._anchor)
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)
        self.first_bytes_of = lru_cache(maxsize=4096)(self._first_bytes_of)

    def shown(self, tokens: Iterable[int]) -> list[int]:
        """Those of the tokens that a text shows."""
        return [token for token in tokens if token not in self.special]

    def tail(self, tokens: Sequence[int]) -> bytes:
        """The last bytes of a text: at least those of one character, when it has as many."""
        found = b""
        for token in reversed(tokens):
            if token not in self.special:
                found = self.bytes_of(token) + found
            if len(found) >= _LONGEST_CHARACTER:
                break
        return found

    def spelled(self, token: int) -> bytes:
        """The bytes of any token, also of one that a text does not show."""
        special = self.special.get(token)
        return self.bytes_of(token) if special is None else special.encode()

    def name(self, token: int) -> str:
        """What a client reads: the text, or as OpenAI writes it `bytes:\\xe5` for a part of a character."""
        spelled = self.spelled(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _bytes_of(self, token: int) -> bytes:
        """What the token adds after other text."""
        text = self._tokenizer.convert_ids_to_tokens(token)
        if text is None or token in self.special:  # a model may have scores for more ids than there are tokens
            return b""
        if self._alphabet is not None:
            return _of_alphabet(text, self._alphabet)
        if _BYTE.fullmatch(text) and self._decode([token]) != text:
            return bytes([int(text[3:5], 16)])
        return self._decode([*self._anchor, token])[len(self._before) :].encode()

    def _first_bytes_of(self, token: int) -> bytes:
        """What the token adds where no text is before it: some decoders drop a space there."""
        inside = self.bytes_of(token)
        if self._alphabet is not None or (inside and inside[0] >= 0x80 and len(inside) == 1):
            return inside
        return self._decode([token]).encode()

    def _decode(self, tokens: list[int]) -> str:
        # Not the tokenizer's clean-up: it changes what was said before, when more comes.
        decoded = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    def _plain_token(self) -> list[int]:
        """A token of letters: what is decoded after it is decoded as in the midst of a text."""
        for token in range(min(len(self._tokenizer), _MAX_ANCHORS)):
            if token in self.special:
                continue
            once, twice = self._decode([token]), self._decode([token, token])
            if once.isalpha() and once.isascii() and twice.startswith(once) and len(twice) > len(once):
                return [token]
        return []


def _of_alphabet(text: str, alphabet: dict[str, int]) -> bytes:
    if all(character in alphabet for character in text):
        return bytes(alphabet[character] for character in text)
    return text.encode()  # a token that was added as text


def _special(tokenizer: Any) -> dict[int, str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        added = backend.get_added_tokens_decoder()
        return {token: entry.content for token, entry in added.items() if entry.special}
    return {token: str(tokenizer.convert_ids_to_tokens(token)) for token in tokenizer.all_special_ids}


def _alphabet(tokenizer: Any) -> dict[str, int] | None:
    """The byte of each character of a token, where tokens are spelled so; None: tokens are spelled as text."""
    if _is_byte_level(tokenizer):
        return _byte_level_alphabet()
    if getattr(tokenizer, "_utf_vocab_size", None) == 256:  # ByT5
        return {chr(byte): byte for byte in range(256)}
    return getattr(tokenizer, "byte_decoder", None)  # byte-level ones written in Python


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    return any(part.get("type") == "ByteLevel" for part in [state, *state.get("decoders", [])])


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
