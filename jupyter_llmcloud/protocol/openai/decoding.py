"""A body to a struct, or a 400 in plain words: which field, what it must be, what was there."""

from __future__ import annotations

import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, TypeVar, cast

import msgspec

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.protocol.openai.fields import OpenAIBody

Kind = TypeVar("Kind")

_PLACE = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_TYPE = re.compile(r"Expected `([^`]*)`, got `([^`]*)`")
_BOUND = re.compile(r"Expected `(\w+)` (>=|<=|>|<) (\S+)")
_LENGTH = re.compile(r"Expected `(\w+)` of length (>=|<=) (\d+)")
_FORM = re.compile("Expected `str` matching regex ")
_ENUM = re.compile(r"Invalid enum value (.*)", re.DOTALL)
_INDEX = re.compile(r"\[(\d+|\.\.\.)\]")
_PART = re.compile(r"[^.\[\]]+|\[\d+\]")
_TYPES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
# What a field may be, where that is more than the name of a type.
_FIELDS = {
    "content": "a string or a list of parts",
    "prompt": "a string, a list of strings, or a list of token ids",
    "input": "a string or a list",
    "stop": "a string or a list of strings",
    "tool_choice": '"none", "auto", "required" or the name of a function',
    "role": "system, developer, user, assistant or tool",
    "messages": "a list of messages",
    "tools": "a list of tools",
}
_FORMS = {"name": "1 to 128 letters of ASCII, digits, '_', '.', ':' or '-'"}  # of texts that have one
_BOUNDS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_MAX_SHOWN = 60
_MAX_UNKNOWN_NULLS = 16  # places, and names that are known elsewhere: each costs a pass over the whole body


def decode(body: bytes, kind: type[Kind]) -> Kind:
    """Decode a body; raises `ApiError` 400 that names the parameter at fault.

    An unknown field that is null asks for nothing: clients send such ones for what they know and do not use.
    """
    for _ in range(_MAX_UNKNOWN_NULLS):
        try:
            return _decoded(body, kind)
        except msgspec.ValidationError as error:
            shorter = _without_nulls(str(error), body)
            if shorter is None:
                raise _wrong_shape(str(error), body, kind) from None
            body = shorter
    raise ApiError(400, "The body has too many unknown parameters. Remove them.", code="unknown_parameter")


def _decoded(body: bytes, kind: type[Kind]) -> Kind:
    try:
        decoded: Kind = _decoder(cast(Hashable, kind)).decode(body)
        return decoded
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None


def _without_nulls(message: str, body: bytes) -> bytes | None:
    """The body without the unknown field of an error, where that is null; None when it asks for something."""
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        return None
    place = found.group(1) if (found := _PLACE.search(message)) else ""
    try:
        value = msgspec.json.decode(body)
        found_one = _drop_null(value, _PART.findall(place), unknown[1], _fields())
        return msgspec.json.encode(value) if found_one else None
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):  # what comes later may be no JSON
        return None


def _drop_null(value: Any, parts: list[str], name: str, known: frozenset[str]) -> bool:
    """Drop a field that is null, in all entries of a list at once; whether there was one.

    With it go those beside it that are null and no field of anything, so that many of them cost no more than one.
    """
    if not parts:
        if not isinstance(value, dict) or name not in value or value[name] is not None:
            return False
        for beside in [key for key, held in value.items() if held is None and (key == name or key not in known)]:
            del value[beside]
        return True
    if parts[0].startswith("["):
        return isinstance(value, list) and any([_drop_null(one, parts[1:], name, known) for one in value])
    return isinstance(value, dict) and _drop_null(value.get(parts[0]), parts[1:], name, known)


def invalid(param: str, message: str) -> ApiError:
    """A value that cannot be."""
    return ApiError(400, message, param=param, code="invalid_value")


def unsupported(param: str, why: str = "it is not supported by this endpoint. Leave it out.") -> ApiError:
    """A parameter that is understood, and asks for what is not possible here."""
    return ApiError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    try:
        text = msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _fields() -> frozenset[str]:
    """The names of the fields of all bodies and their parts."""
    kinds: list[Any] = [OpenAIBody]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return frozenset(name for kind in kinds for name in kind.__struct_encode_fields__)


@lru_cache(maxsize=64)
def _decoder(kind: Any) -> Any:
    return msgspec.json.Decoder(kind)


def _wrong_shape(message: str, body: bytes, kind: type) -> ApiError:
    place = found.group(1) if (found := _PLACE.search(message)) else ""
    if unknown := _UNKNOWN.search(message):
        param = f"{place}.{unknown[1]}".lstrip(".")
        text = f"Unknown parameter {param[:128]!r}: it is not supported here. Remove it."
        return ApiError(400, text, param=param[:128], code="unknown_parameter")
    if missing := _MISSING.search(message):
        param = f"{place}.{missing[1]}".lstrip(".")
        return ApiError(400, f"Parameter {param!r} is missing.", param=param, code="missing_required_parameter")
    if not place:
        got = wrong[2] if (wrong := _TYPE.match(message)) else ""
        return ApiError(400, f"The body must be an object, not {_TYPES.get(got, got)}.", code="invalid_type")
    error = _wrong_value(place, _PLACE.sub("", message), _at(place, body))
    if error.param is not None:
        error.param = error.param.partition("[...]")[0]  # which entry of an object it is, is not known
    return error


def _wrong_value(place: str, message: str, seen: str) -> ApiError:
    name = _INDEX.sub("", place).rpartition(".")[2]
    if wrong := _TYPE.fullmatch(message):
        if wrong[1] == "null" or wrong[1] in ("array of length <= 0",):
            return unsupported(place)
        must = _FIELDS.get(name) if not place.endswith("]") else None
        return ApiError(400, f"{place} must be {must or _words(wrong[1])}, not {_TYPES.get(wrong[2], wrong[2])}{seen}.",
                        param=place, code="invalid_type")  # fmt: skip
    if wrong := _BOUND.match(message):
        return invalid(place, f"{place} must be {_BOUNDS[wrong[2]]} {wrong[3].removesuffix('.0')}{seen}.")
    if wrong := _LENGTH.fullmatch(message):
        if (wrong[2], wrong[3]) == ("<=", "0"):
            return unsupported(place)
        of = "characters" if wrong[1] == "str" else "entries"
        few = "at least" if wrong[2] == ">=" else "at most"
        return invalid(place, f"{place} must have {few} {wrong[3]} {of}.")
    if _FORM.match(message):
        return invalid(place, f"{place} must be {_FORMS.get(name, 'written otherwise')}{seen}.")
    if wrong := _ENUM.fullmatch(message):
        must = f": it must be {_FIELDS[name]}" if name in _FIELDS else " is not supported here"
        return ApiError(400, f"{place}={wrong[1][:_MAX_SHOWN]}{must}.", param=place, code="unsupported_value")
    return ApiError(400, f"{place}: {message}{seen}.", param=place, code="invalid_value")


def _words(types: str) -> str:
    names = [_TYPES.get(name, name) for name in types.split(" | ") if name != "null"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _at(place: str, body: bytes) -> str:
    """What stands there, as JSON; nothing for a place inside an object without names, or when JSON breaks off later."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    for part in _PART.findall(place):
        try:
            value = value[int(part[1:-1])] if part.startswith("[") else value[part]
        except (LookupError, TypeError, ValueError):
            return ""
    return f" ({shown(value)})"
