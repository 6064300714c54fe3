"""What a stream of text looks like on a terminal, as far as progress bars go: back, up, erase.

Plain text passes through at the cost of one split. Once a line rewrites itself the screen keeps its rows
open: a line end between two nested bars is followed by a "cursor up"; only without one are they final. Who
hides the cursor comes back to its rows later: they are open until the cursor is shown again.
"""

from __future__ import annotations

import re

_CONTROL = re.compile(r"(\r\n|\n|\r|\x08+|\x1b\[\??[\d;]*[A-HJKSTfhl])")
_REWRITES = re.compile(r"\r(?!\n)|\x08|\x1b\[\??[\d;]*[A-HJKSTfhl]")
_BEGUN = re.compile(r"(\r|\x1b(\[\??[\d;]{0,8})?)$")  # the first part of a sequence, perhaps
_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_MAX_ROWS = 64
_MAX_ROW_CHARS = 200_000  # each piece of a row that goes on is joined to it


class Screen:
    """The unfinished end of one stream of one rank."""

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self.settling_since: float | None = None
        self.live_since = 0.0
        self.is_rewritten = False
        self._held = ""
        self._parts: list[str] = []
        self._num_chars = 0
        self._rows: list[str] = [""]
        self._row = 0
        self._returned = False
        self._is_hidden = False

    @property
    def is_live(self) -> bool:
        """Is there text that is not a complete line yet?"""
        return bool(self.current.strip()) if self.is_rewritten else self._num_chars > 0

    @property
    def current(self) -> str:
        """The unfinished line as it looks now."""
        if not self.is_rewritten:
            return "".join(self._parts)
        return self._rows[self._row] or next((row for row in reversed(self._rows) if row), "")

    def write(self, text: str, now: float) -> list[str]:
        """Lines that `text` completes."""
        text = self._held + text
        begun = _BEGUN.search(text, max(0, len(text) - 12))
        self._held = begun[0] if begun else ""
        text = text.removesuffix(self._held)
        if not self.is_rewritten:
            if not _REWRITES.search(text):
                return self._write_plain(text, now)
            self._begin_rewriting(now)
        return self._write_rows(text, now)

    def settle(self) -> list[str]:
        """The rows above the cursor, which nothing came back to."""
        lines = self._leave_rows()
        if self._rows == [""]:
            self._end_rewriting()
        return lines

    def close(self) -> list[str]:
        """Everything, complete or not."""
        self._held = ""
        if not self.is_rewritten:
            lines = ["".join(self._parts)] if self._num_chars else []
            self._parts, self._num_chars = [], 0
            return lines
        rows = self._rows
        while rows and not rows[-1]:
            rows = rows[:-1]
        self._is_hidden = False
        self._end_rewriting()
        return rows

    def _write_plain(self, text: str, now: float) -> list[str]:
        lines = text.replace("\r\n", "\n").split("\n")
        rest = lines.pop()
        if lines:
            lines[0] = "".join([*self._parts, lines[0]])
            self._parts, self._num_chars = [], 0
        if rest and self._num_chars < self.max_chars:
            if not self._parts:
                self.live_since = now
            self._parts.append(rest)
            self._num_chars += len(rest)
        return lines

    def _begin_rewriting(self, now: float) -> None:
        self.is_rewritten = True
        self.live_since = now
        self._rows, self._row, self._returned = ["".join(self._parts)], 0, False
        self._parts, self._num_chars = [], 0

    def _end_rewriting(self) -> None:
        self.is_rewritten = False
        self.settling_since = None
        self._rows, self._row, self._returned = [""], 0, False

    def _write_rows(self, text: str, now: float) -> list[str]:
        lines: list[str] = []
        for piece in _CONTROL.split(text):
            if piece in ("\n", "\r\n"):
                lines += self._line_end()
            elif piece == "\r":
                self._returned = True
            elif piece.startswith("\x08"):
                self._back(len(piece))
            elif _CONTROL.fullmatch(piece):
                self._control(piece)
            elif piece:
                self._put(piece)
        if self._is_hidden:
            self.settling_since = None
        elif self._row:
            self.settling_since = now if self.settling_since is None else self.settling_since
        else:
            self.settling_since = None
            if self._rows == [""]:
                self._end_rewriting()
        return lines

    def _control(self, sequence: str) -> None:
        """Obey an escape sequence; one that only moves about within a line is left out."""
        kind, number = sequence[-1], sequence[2:-1]
        if sequence in (_HIDE, _SHOW):
            self._is_hidden = sequence == _HIDE
        elif kind in "AF":
            self._row = max(0, self._row - (int(number) if number.isdigit() else 1))
            self._returned = self._returned or kind == "F"
        elif kind == "K" and (number == "2" or self._returned):
            self._rows[self._row] = ""
        elif kind == "G":
            self._returned = True

    def _back(self, count: int) -> None:
        row = self._rows[self._row]
        self._rows[self._row] = row[: max(0, len(row) - count)]

    def _leave_rows(self) -> list[str]:
        lines, self._rows = self._rows[: self._row], self._rows[self._row :]
        self._row = 0
        self.settling_since = None
        return lines

    def _line_end(self) -> list[str]:
        self._row += 1
        self._returned = False
        if self._row == len(self._rows):
            self._rows.append("")
        return self._leave_rows() if self._row > _MAX_ROWS else []

    def _put(self, piece: str) -> None:
        before = "" if self._returned else self._rows[self._row]
        if self._returned:
            piece = piece.rstrip(" ")  # bars pad with spaces to wipe what was there
        row, limit = before + piece, min(self.max_chars, _MAX_ROW_CHARS)
        self._rows[self._row] = row if len(row) <= limit else f"{row[: limit - 1]}…"
        self._returned = False
