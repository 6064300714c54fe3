"""Tokens with scores as they are shown: what is seen of a token, how wide it is, where lines end, which count most."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_SEEN = {"\n": "⏎", "\t": "⇥", " ": "·", "\r": "␍", "": "∅"}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, marks that turn text round, halves of characters
LONGEST = 40


def visible(token: str) -> str:
    """A token as people can see it: spaces and line ends by a sign, what would change its surroundings as `�`."""
    shown = "".join(_SEEN.get(char) or ("�" if unicodedata.category(char) in _UNSEEN else char) for char in token)
    return _SEEN[""] if not shown else shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def columns(text: str) -> int:
    """How many places of a monospaced font it takes."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return max(1, len(text) + wide - sum(bool(unicodedata.combining(char)) for char in text))


@dataclass(frozen=True)
class PlacedToken:
    """A token in a picture.

    Attributes:
        number: of the token.
        text: what is seen of it.
        line: the line that it is in, from 0.
        column: where it begins.
        width: in columns, without the gap after it.
    """

    number: int
    text: str
    line: int
    column: int
    width: int


def placed(tokens: Sequence[str], width: int, gap: int = 1) -> list[PlacedToken]:
    """Tokens one behind the other in lines of `width` columns; a line ends after a token with a line end."""
    found: list[PlacedToken] = []
    line, column = 0, 0
    for number, token in enumerate(tokens):
        text = visible(token)
        size = min(columns(text), width)
        if column and column + size > width:
            line, column = line + 1, 0
        found.append(PlacedToken(number, text, line, column, size))
        column += size + gap
        if "\n" in token:
            line, column = line + 1, 0
    return found


def strengths(scores: Sequence[float]) -> list[float]:
    """Scores between -1 and 1: the strongest one of either sign is 1 or -1."""
    most = max((abs(score) for score in scores), default=0.0)
    return [score / most if most else 0.0 for score in scores]


def strongest(scores: Sequence[float], count: int) -> list[int]:
    """The numbers of the strongest ones, of either sign; those of 0 are none."""
    order = sorted(range(len(scores)), key=lambda number: -abs(scores[number]))
    return [number for number in order[:count] if scores[number]]


def is_complete(difference: float, change: float) -> bool:
    """Whether scores add up to what they should, but for a hundredth of it (or for what rounding makes)."""
    return abs(difference) <= max(0.01 * abs(change), 1e-3)
