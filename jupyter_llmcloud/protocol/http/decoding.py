"""A body or a query as its struct; what is wrong with it is said by the name of the field and the value seen."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.http.base import Body, Query

B = TypeVar("B", bound=Body)
Q = TypeVar("Q", bound=Query)

_COMPLAINT = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?", re.DOTALL)
_WHOLE = re.compile(r"(-?)0*([0-9]{1,18})", re.ASCII)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_WORDS = {"array": "list", "object": "dict"}
_NUMBERS = (inspect.IntType, inspect.FloatType)


class WrongField(UsageError):
    """A field of a body that is not as it must be.

    Attributes:
        field: its name: script.arguments.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def decode_body(kind: type[B], content: bytes) -> B:
    """The JSON object in `content`; an empty one counts as {}. Raises UsageError."""
    try:
        body = msgspec.json.decode(content or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise UsageError("the body must be a JSON object.")
    given = {name: value for name, value in body.items() if value is not None}
    known = [field.encode_name for field in _fields(kind)]
    if unknown := sorted(set(given) - set(known)):
        message = f"field {unknown[0]!r:.80} is not known here: {', '.join(known) or 'none'} are."
        raise WrongField(message, unknown[0][:80])
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        complaint = _Complaint(kind, given, str(error))
        message = complaint.in_words()
        raise WrongField(message, complaint.name) from None


def decode_query(kind: type[Q], arguments: Mapping[str, str]) -> Q:
    """What a query says by names that are known here; an empty value counts as left out. Raises UsageError."""
    given: dict[str, Any] = {}
    for field in _fields(kind):
        if text := arguments.get(field.encode_name, ""):
            given[field.encode_name] = _number(_bare(field.type), text)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        complaint = _Complaint(kind, given, str(error))
        if not complaint.names:
            raise UsageError(complaint.in_words()) from None
        raise UsageError(complaint.of_query(arguments[complaint.names[0]])) from None


def _number(kind: inspect.Type, text: str) -> int | float | str:
    """What a field of this type is given; a text that is no number for it is left to be refused."""
    if isinstance(kind, inspect.IntType) and (whole := _WHOLE.fullmatch(text)):
        return int(whole[1] + whole[2])
    if isinstance(kind, inspect.FloatType):
        with contextlib.suppress(ValueError):
            if not math.isnan(value := float(text)):
                return value
    return text


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return info.fields


def _bare(kind: inspect.Type) -> Any:
    """Without what is said about it, and without None."""
    if isinstance(kind, inspect.Metadata):
        return _bare(kind.type)
    if isinstance(kind, inspect.UnionType):
        return next(_bare(item) for item in kind.types if not isinstance(item, inspect.NoneType))
    return kind


def _examples(kind: inspect.Type) -> list[str]:
    """What is said of a field, beside its type, of how it is written."""
    said = (kind.extra_json_schema or {}) if isinstance(kind, inspect.Metadata) else {}
    return list(map(str, said.get("examples", ())))


class _Complaint:
    """What msgspec finds wrong, with the names and the value that belong to it."""

    def __init__(self, kind: type[msgspec.Struct], given: Any, text: str) -> None:
        found = _COMPLAINT.fullmatch(text)
        assert found is not None
        self.what: str = found["what"]
        self.names: list[str] = []
        self.value, self.fields = given, _fields(kind)
        self.type: Any = None
        self.examples: list[str] = []
        for name, index in _STEP.findall(found["path"] or ""):
            self._step(name, index)

    def _step(self, name: str, index: str) -> None:
        if name:
            self.names.append(name)
            kind = next(field.type for field in self.fields if field.encode_name == name)
            self.type, self.examples = _bare(kind), _examples(kind)
            self.value = self.value.get(name)
        elif isinstance(self.type, inspect.ListType):
            self.type, self.value = _bare(self.type.item_type), self.value[int(index)]
        if isinstance(self.type, inspect.StructType):
            self.fields = self.type.fields

    @property
    def name(self) -> str:
        """As it would be written: script.arguments."""
        return ".".join(self.names)

    @property
    def bounds(self) -> str:
        """`1 to 64`, of a number; empty where it has none."""
        least, most = (getattr(self.type, name, None) for name in ("ge", "le"))
        if least is not None and most is not None:
            return f"{least:.10g} to {most:.10g}"
        return f"at least {least:.10g}" if least is not None else f"at most {most:.10g}" if most is not None else ""

    def in_words(self) -> str:
        """One sentence or two."""
        for pattern, say in _SAYINGS:
            if found := pattern.fullmatch(self.what):
                return say(self, found)
        return f"{self.name}: {self.what}."

    def of_query(self, text: str) -> str:
        """The same of a value in a query."""
        if isinstance(self.type, _NUMBERS):
            bounds = f" from {self.bounds}" if self.bounds else ""
            return f"{self.name}={text!r:.80} is not a number{bounds}."
        values = ", ".join(map(str, getattr(self.type, "values", ())))
        return f"{self.name}={text!r:.80} is not possible: write {values}, or leave it out."

    def wrong_type(self, found: re.Match[str]) -> str:
        """A value of another type."""
        wanted = [_WORDS.get(word, word) for word in found[1].split(" | ") if word != "null"]
        return f"{self.name} must be {' or '.join(wanted)}, not {self.value!r:.80}."

    def missing(self, found: re.Match[str]) -> str:
        """A field that has no default."""
        self._step(found[1], "")
        kind = type(self.type).__name__.removesuffix("Type").lower()
        return f"{self.name} must be {kind}, and is missing."

    def unknown(self, found: re.Match[str]) -> str:
        """A field that there is not, below one that there is."""
        known = ", ".join(field.encode_name for field in self.fields)
        return f"{self.name}.{found[1]:.80} is not known here: {known} are."

    def too_long(self, found: re.Match[str]) -> str:
        """A text of too many characters."""
        return f"{self.name} has {len(self.value)} characters: {found[1]} at most."

    def another_form(self, found: re.Match[str]) -> str:
        """A text that is not written as it must be: by examples, where there are some."""
        form = f"write it as in {' or '.join(self.examples)}" if self.examples else f"it must match {found[1]}"
        return f"{self.name} {self.value!r:.80} is not possible: {form}."

    def out_of_bounds(self, found: re.Match[str]) -> str:
        """A number that is too small or too large."""
        shown = f"{self.value:.10g}" if isinstance(self.value, float) else f"{self.value!r:.80}"
        return f"{self.name} {shown} is not possible: {self.bounds}."

    def not_a_choice(self, found: re.Match[str]) -> str:
        """None of the values that there are."""
        return f"{self.name} {self.value!r:.80} is not possible. Choose one of {', '.join(map(str, self.type.values))}."


_SAYINGS: list[tuple[re.Pattern[str], Callable[[_Complaint, re.Match[str]], str]]] = [
    (re.compile("Expected `(.+)`, got `.+`"), _Complaint.wrong_type),
    (re.compile("Object missing required field `(.+)`"), _Complaint.missing),
    (re.compile("Object contains unknown field `(.+)`", re.DOTALL), _Complaint.unknown),
    (re.compile("Expected `str` of length <= (.+)"), _Complaint.too_long),
    (re.compile("Expected `str` matching regex '(.+)'", re.DOTALL), _Complaint.another_form),
    (re.compile("Expected `(?:int|float)` [<>]=? .+"), _Complaint.out_of_bounds),
    (re.compile("Invalid enum value .+", re.DOTALL), _Complaint.not_a_choice),
]
