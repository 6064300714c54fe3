"""Keys that were read a moment ago, and have not changed since."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

MAX_AGE_S = 0.5  # as often as the keys of requests that go on are read
MAX_KEYS = 1000

Stamp = tuple[int, int, int]


class KnownKey(NamedTuple):
    """A key as it was read.

    Attributes:
        stamp: of the state before that.
        read_at: on the clock of `time.monotonic`.
    """

    key: StoredKey
    stamp: Stamp
    read_at: float


class KnownKeys:
    """What was written since is known by the stamp of the state's file; no secret is held.

    Args:
        state: where keys are kept.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._known: dict[bytes, KnownKey] = {}

    def get(self, text: str) -> KnownKey | None:
        """The key that is written so, with the secret that it has; None: it must be read."""
        known = self._known.get(_digest(text))
        return known if known is not None and self.is_fresh(known) else None

    def is_fresh(self, known: KnownKey) -> bool:
        """Whether it need not be read again."""
        return time.monotonic() - known.read_at <= MAX_AGE_S and known.stamp == self._state.stamp()

    def put(self, text: str, key: StoredKey, stamp: Stamp) -> KnownKey:
        """A key was read, and its secret is right; `stamp`: of the state before that."""
        if len(self._known) >= MAX_KEYS:
            self._known.clear()
        known = self._known[_digest(text)] = KnownKey(key, stamp, time.monotonic())
        return known


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=32).digest()
