"""Keys that were read a moment ago, and have not changed since."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jupyter_llmcloud.storage.server_state import ServerState, StoredKey

MAX_AGE_S = 0.5  # as often as the keys of requests that go on are read
MAX_KEYS = 1000
IN_USE_S = 1.0
MAX_LOOKS = 16  # at once

Stamp = tuple[int, int, int]


@dataclass(eq=False, slots=True)
class KnownKey:
    """A key as it was read.

    Attributes:
        stamp: of the state before it was read last.
        read_at: when that was, on the clock of `time.monotonic`.
        used_at: when a request came with it last.
    """

    key: StoredKey
    stamp: Stamp
    read_at: float
    used_at: float


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
        now = known.used_at = time.monotonic()
        if now - known.read_at <= MAX_AGE_S and known.stamp == self._state.stamp():
            return True
        return self._read_again(known, now)

    def _read_again(self, known: KnownKey, now: float) -> bool:
        stamp = self._state.stamp()
        if self._state.key(known.key.id) is not known.key:  # it is the same object as long as its row is the same
            return False
        known.stamp, known.read_at = stamp, now
        return True

    def look_again(self) -> None:
        """Usage was written to the same file: read the keys that are in use, before a request waits for that."""
        now = time.monotonic()
        in_use = [known for known in self._known.values() if now - known.used_at <= IN_USE_S]
        for known in in_use[:MAX_LOOKS]:
            try:
                self._read_again(known, now)
            except (OSError, sqlite3.Error):  # the next request looks itself; what was written stays written
                return

    def put(self, text: str, key: StoredKey, stamp: Stamp) -> KnownKey:
        """A key was read, and its secret is right; `stamp`: of the state before that."""
        if len(self._known) >= MAX_KEYS:
            self._known.clear()
        now = time.monotonic()
        known = self._known[_digest(text)] = KnownKey(key, stamp, now, now)
        return known


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=32).digest()
