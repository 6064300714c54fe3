"""Cleaning steps with a name. Each takes a text and gives it cleaned, or None to drop it."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jupyter_llmcloud.core.data.step_names import NAMES
from jupyter_llmcloud.errors import LLMCloudError, UsageError

TextStep = Callable[[str], str | None]
_TAGS = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL | re.IGNORECASE)
_SPACE = re.compile(r"[^\S\n]+")
_LINES = re.compile(r"\n{3,}")
_URLS = re.compile(r"\b(?:https?://|www\.)\S+")
_MAILS = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")


def _html(text: str) -> str:
    return html.unescape(_TAGS.sub(" ", text))


def _whitespace(text: str) -> str:
    return _LINES.sub("\n\n", _SPACE.sub(" ", text.replace("\r\n", "\n"))).strip()


def _drop_short(limit: int) -> TextStep:
    return lambda text: text if len(text) >= limit else None


def _drop_long(limit: int) -> TextStep:
    return lambda text: text if len(text) <= limit else None


def _drop_symbols(percent: int) -> TextStep:
    def step(text: str) -> str | None:
        letters = sum(char.isalnum() or char.isspace() for char in text)
        return text if (len(text) - letters) * 100 <= percent * len(text) else None

    return step


_STEPS: dict[str, TextStep] = {
    "strip": str.strip,
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "lowercase": str.lower,
    "whitespace": _whitespace,
    "html": _html,
    "urls": lambda text: _URLS.sub("", text),
    "emails": lambda text: _MAILS.sub("", text),
    "control": lambda text: _CONTROL.sub("", text),
    "drop-empty": lambda text: text if text.strip() else None,
}
_WITH_NUMBER: dict[str, Callable[[int], TextStep]] = {
    "drop-short": _drop_short,
    "drop-long": _drop_long,
    "drop-symbols": _drop_symbols,
}
assert {*_STEPS, *_WITH_NUMBER} == {*NAMES}


class Cleaning:
    """All steps of a recipe, one after the other.

    Args:
        names: of the steps.
        own: the user's functions among them, by name; on rows of columns they take and give a whole row (a dict).
        column: that the named steps clean in a row.
    """

    def __init__(self, names: Iterable[str], own: Mapping[str, Callable[[Any], Any]], column: str) -> None:
        self._steps = [(name, *self._find(name, own)) for name in names]
        self._column = column

    @staticmethod
    def _find(name: str, own: Mapping[str, Callable[[Any], Any]]) -> tuple[Callable[[Any], Any], bool]:
        if name in own:
            return own[name], True
        base, _, number = name.partition(":")
        return (_WITH_NUMBER[base](int(number)) if number else _STEPS[base]), False

    def text(self, text: str) -> str | None:
        """A text after all steps; None when one has dropped it. Raises UsageError that names a step which failed."""
        for name, step, is_own in self._steps:
            try:
                result = step(text)
            except Exception as error:
                raise _failed(name, error, text) from error
            if result is None or result is False:
                return None
            if result is not True:
                text = result
            if is_own and not isinstance(text, str):
                raise UsageError(
                    f"the step {name!r} gave {type(text).__name__} {text!r:.60}: a step gives the text, or None."
                )
        return text

    def row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The same for a row of columns."""
        for name, step, is_own in self._steps:
            try:
                if is_own:
                    result = step(row)
                elif not isinstance(text := row.get(self._column), str):
                    raise UsageError(
                        f"the step {name!r} cleans texts, and the column {self._column!r} holds {text!r:.40} "
                        f"(columns: {', '.join(row)}). Say which: text_column=."
                    )
                else:
                    cleaned = step(text)
                    result = None if cleaned is None else {**row, self._column: cleaned}
            except LLMCloudError:
                raise
            except Exception as error:
                raise _failed(name, error, row) from error
            if result is None or result is False:
                return None
            if result is not True:
                row = result
            if not isinstance(row, dict):
                raise UsageError(f"the step {name!r} gave {row!r:.60}: on rows a step gives the row (a dict), or None.")
        return row


def _failed(name: str, error: Exception, value: Any) -> UsageError:
    return UsageError(f"the step {name!r} failed with {type(error).__name__}: {error} on {value!r:.120}.")
