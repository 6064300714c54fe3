"""The end of what a rank has written, of which the middle is left out."""

from __future__ import annotations

from collections import deque

from jupyter_llmcloud.core.output.terminal import Screen

MAX_LINES = 20
MAX_TEXT = 16 << 10  # characters that are kept of text that nobody has taken apart
MAX_WIDTH = 300
_PIECE = 2_000  # how far back the newest line is looked for


class Tail:
    """Of one rank: lines that came too late to be shown, and text after them that nobody takes apart.

    Attributes:
        num_lines: left out so far.
        live_since: when the newest of it came.
    """

    is_rewritten = True

    def __init__(self) -> None:
        self.num_lines = 0
        self.live_since = 0.0
        self._lines: deque[tuple[str, str]] = deque(maxlen=MAX_LINES)
        self._texts: deque[tuple[str, str]] = deque()
        self._num_chars = 0
        self._is_torn = False  # the text begins in the middle of something

    def add_line(self, kind: str, line: str, now: float) -> None:
        """A line of "stdout" or "stderr" that had waited to be shown: it is older than the text there is."""
        self.num_lines += 1
        self.live_since = now
        if not self._is_torn:
            self._lines.append((kind, line))

    def add_text(self, kind: str, text: str, now: float) -> None:
        """Text as it was written."""
        self.num_lines += text.count("\n")
        self.live_since = now
        self._texts.append((kind, text[-MAX_TEXT:]))
        self._num_chars += min(len(text), MAX_TEXT)
        self._is_torn |= len(text) > MAX_TEXT
        while self._num_chars - len(self._texts[0][1]) > MAX_TEXT:
            self._num_chars -= len(self._texts.popleft()[1])
            self._is_torn = True
        if self._is_torn:
            self._lines.clear()

    def clear(self) -> None:
        """The rank takes back all it has written."""
        self.num_lines = self._num_chars = 0
        self._is_torn = False
        self._lines.clear()
        self._texts.clear()

    @property
    def is_live(self) -> bool:
        """Whether anything was left out."""
        return bool(self._texts or self._lines)

    @property
    def current(self) -> str:
        """The newest line, complete or not."""
        if self._texts:
            ends = self._texts[-1][1][-_PIECE:].replace("\r", "\n").split("\n")
            return next((end for end in reversed(ends) if end.strip()), "")
        return self._lines[-1][1] if self._lines else ""

    def lines(self) -> list[tuple[str, str]]:
        """(kind, line) of the last lines, at most MAX_LINES."""
        found = list(self._lines)
        screens: dict[str, Screen] = {}
        for kind, text in self._texts:
            screen = screens.setdefault(kind, Screen(MAX_TEXT))
            found += [(kind, line) for line in screen.write(text, 0.0)]
        for kind, screen in screens.items():
            found += [(kind, line) for line in screen.close()]
        whole = found[1:] if self._is_torn and len(found) > 1 else found
        return [(kind, _cut(line)) for kind, line in whole[-MAX_LINES:]]


def _cut(line: str) -> str:
    half = MAX_WIDTH // 2
    return line if len(line) <= MAX_WIDTH else f"{line[:half]}…{line[-half:]}"
