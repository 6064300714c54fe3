"""Scoped keys: their written form, and what their scopes allow. Bytes and text in, values out.

sk-llmc-<id>-<secret>-<crc>     id: 8 letters, names the key in lists and logs
                                secret: 256 bits in base 62, known to its holder alone
                                crc: tells a mistyped key from a wrong one, and secret scanners what they found
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import hmac
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.errors import UsageError

PREFIX = "sk-llmc-"
NUM_ID_BYTES = 5
NUM_SECRET_BYTES = 32
READ_MODELS = "models:read"
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_WRITTEN = re.compile(r"sk-llmc-([0-9a-hjkmnp-tv-z]{8})-([0-9A-Za-z]{43})-([0-9a-f]{8})", re.ASCII)
_GLOB = re.compile(r"[\w.*?-]{1,128}", re.ASCII)


@dataclass(frozen=True)
class ApiKey:
    """A key as its holder has it. Its repr never shows the secret."""

    id: str
    secret: str

    def __repr__(self) -> str:
        return f"ApiKey({self.id})"

    @property
    def text(self) -> str:
        """The written form."""
        body = f"{self.id}-{self.secret}"
        return f"{PREFIX}{body}-{_crc(body)}"

    @property
    def digest(self) -> str:
        """SHA-256 of the secret: all that a server keeps. (256 random bits need no slow hash.)"""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def matches(self, digest: str) -> bool:
        """Does this key have that digest? Takes as long for a wrong key as for the right one."""
        return hmac.compare_digest(self.digest, digest)


def make_key(id_bytes: bytes, secret_bytes: bytes) -> ApiKey:
    """A key of 5 and 32 random bytes, which the caller draws."""
    if len(id_bytes) != NUM_ID_BYTES or len(secret_bytes) != NUM_SECRET_BYTES:
        raise ValueError(f"a key is made of {NUM_ID_BYTES} and {NUM_SECRET_BYTES} bytes")
    key_id = _digits(int.from_bytes(id_bytes, "big"), _ID_ALPHABET, 8)
    return ApiKey(key_id, _digits(int.from_bytes(secret_bytes, "big"), _ALPHABET, 43))


def looks_like_key(text: str) -> bool:
    """Was this meant to be one of our keys? Then nothing else is tried with it."""
    return text.startswith(PREFIX)


def parse_key(text: str) -> ApiKey | None:
    """The key written in `text`; None when it is not one (also: mistyped)."""
    match = _WRITTEN.fullmatch(text)
    if not match or not hmac.compare_digest(_crc(f"{match[1]}-{match[2]}"), match[3]):
        return None
    return ApiKey(match[1], match[2])


def check_scopes(scopes: Iterable[str]) -> list[str]:
    """The scopes, sorted and without repeats; raises UsageError for one that does not exist."""
    wanted = sorted(set(scopes))
    for scope in wanted:
        kind, _, glob = scope.partition(":")
        if scope != READ_MODELS and not (kind == "infer" and _GLOB.fullmatch(glob)):
            raise UsageError(
                f"scope {scope!r} does not exist: write {READ_MODELS}, or infer:NAME, where NAME may hold * and ?."
            )
    if not wanted:
        raise UsageError(f"a key needs at least one scope: {READ_MODELS}, or infer:NAME.")
    return wanted


def may_infer(scopes: Iterable[str], endpoint: str) -> bool:
    """Do the scopes allow asking this endpoint?"""
    return bool(NAME_PATTERN.fullmatch(endpoint)) and _may_infer(tuple(scopes), endpoint)


@functools.lru_cache(maxsize=1024)  # it is asked with every request; names are short here
def _may_infer(scopes: tuple[str, ...], endpoint: str) -> bool:
    globs = (scope.removeprefix("infer:") for scope in scopes if scope.startswith("infer:"))
    return any(fnmatch.fnmatchcase(endpoint, glob) for glob in globs)


def covers(scopes: Iterable[str], text: str) -> bool:
    """Does a scope's glob match a text that is the name of no endpoint, so that it may be told so?"""
    globs = (scope.removeprefix("infer:") for scope in scopes if scope.startswith("infer:"))
    return not NAME_PATTERN.fullmatch(text) and any(fnmatch.fnmatchcase(text, glob) for glob in globs)


def may_read_models(scopes: Iterable[str]) -> bool:
    """Do the scopes allow listing models?"""
    return READ_MODELS in scopes


def _crc(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _digits(number: int, alphabet: str, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(alphabet))
        digits.append(alphabet[digit])
    return "".join(reversed(digits))
