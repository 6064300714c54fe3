"""Values that can be written into a program as they are."""

from __future__ import annotations

import math
from typing import Any

MAX_CHARS = 2000


def literal(value: Any) -> str:
    """The text of a number, a string, None, or a container of such; "" for everything else, and for what is long."""
    text = repr(value) if _is_plain(value) else ""
    return text if len(text) <= MAX_CHARS else ""


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth > 8:
        return False
    if value is None or type(value) in (bool, int, str, bytes):
        return type(value) is not int or abs(value) < 10**1000  # longer ones Python does not write
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is dict:
        return all(_is_plain(part, depth + 1) for item in value.items() for part in item)
    if type(value) in (list, tuple) or (type(value) is set and value):
        return len(value) <= MAX_CHARS and all(_is_plain(part, depth + 1) for part in value)
    return False
