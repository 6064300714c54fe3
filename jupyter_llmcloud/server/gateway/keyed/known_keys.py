"""Keys that were read a moment ago, and have not changed since."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

MAX_AGE_S = 0.5  # as often as the keys of requests that go on are read
MAX_KEYS = 1000

Stamp = tuple[int, int, int]


@dataclass(eq=False, slots=True)
class KnownKey:
    """A key as it was read.

    Attributes:
        stamp: of the state before it was read last.
        read_at: when that was, on the clock of `time.monotonic`.
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
        return known if known is not None and self.is_current(known) else None

    def is_current(self, known: KnownKey) -> bool:
        """Whether it is still as it was read, for which it is read again where it may not be."""
        now, stamp = time.monotonic(), self._state.stamp()
        if now - known.read_at <= MAX_AGE_S and known.stamp == stamp:
            return True
        # Usage is written where keys are, so the stamp seldom stays. A row that is the same gives the same object.
        if self._state.key(known.key.id) is not known.key:
            return False
        known.stamp, known.read_at = stamp, now
        return True

    def put(self, text: str, key: StoredKey, stamp: Stamp) -> KnownKey:
        """A key was read, and its secret is right; `stamp`: of the state before that."""
        if len(self._known) >= MAX_KEYS:
            self._known.clear()
        known = self._known[_digest(text)] = KnownKey(key, stamp, time.monotonic())
        return known


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=32).digest()
