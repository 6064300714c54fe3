"""Calls of tools in the text of an answer, as families of models write them; what is no call gives None.

Sources: the chat templates that the families publish with their tokenizers.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_XML_CALL = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_GLM_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", re.DOTALL)
_MISTRAL_CALL = re.compile(r"\s*([A-Za-z0-9_.:-]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK_CALL = re.compile(r"<｜tool▁call▁begin｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```)?\s*\Z", re.DOTALL)
_KIMI_CALL = re.compile(
    r"<\|tool_call_begin\|>\s*(?:functions\.)?([^\s:<]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>(.*?)"
    r"(?:<\|tool_call_end\|>|\Z)",
    re.DOTALL,
)
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,),
    "null": (type(None),), "string": (str,),
}  # fmt: skip
_PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}
_NOT_JSON = object()


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"{text} is no number of JSON")


# Neither NaN nor what is too large: the arguments are JSON again in the end.
_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


class Call(NamedTuple):
    """A call of a tool, its arguments as JSON text."""

    name: str
    arguments: str


Parameters = Mapping[str, Mapping[str, Any]]  # JSON schemas of the parameters of each tool


def read_hermes(body: str, parameters: Parameters) -> list[Call] | None:
    """`{"name": ..., "arguments": {...}}`, or as Qwen's coders write it `<function=name><parameter=key>value`."""
    if "<function=" in body:
        if _XML_CALL.sub("", body).strip():
            return None  # something stands there that no call would hold
        return [
            Call(found[1], _dumped(_typed(_XML_PARAMETER.findall(found[2]), parameters.get(found[1], {}))))
            for found in _XML_CALL.finditer(body)
        ] or None
    return _calls(_values(body))


def read_glm(body: str, parameters: Parameters) -> list[Call] | None:
    """The name, then pairs of `<arg_key>key</arg_key><arg_value>value</arg_value>`."""
    name, separator, rest = body.partition("<arg_key>")
    name, pairs = name.strip(), _GLM_PAIR.findall(separator + rest)
    if not name or any(letter.isspace() for letter in name) or (separator and not pairs):
        return None
    return [Call(name, _dumped(_typed(pairs, parameters.get(name, {}))))]


def read_mistral(body: str, parameters: Parameters) -> list[Call] | None:
    """A list of `{"name": ..., "arguments": {...}}`, or `name[ARGS]{...}`, which may be repeated."""
    if isinstance(value := _loaded(body), list):
        return _calls(value)
    calls: list[Call] = []
    for part in body.split("[TOOL_CALLS]"):
        position = 0
        while found := _MISTRAL_CALL.match(part, position):
            try:
                arguments, position = _DECODER.raw_decode(part, found.end())
            except (ValueError, RecursionError):
                return None
            calls.append(Call(found[1], _dumped(arguments)))
        if part[position:].strip():
            return None
    return calls or None


def read_deepseek(body: str, parameters: Parameters) -> list[Call] | None:
    """Calls between marks: of V3 and R1 `function｜sep｜name` and fenced JSON, of V3.1 `name｜sep｜` and JSON."""
    calls: list[Call] = []
    for found in _DEEPSEEK_CALL.finditer(body):
        kind, separator, rest = found[1].partition("<｜tool▁sep｜>")
        if not separator:
            return None
        name, text = kind.strip(), rest
        if name == "function" and "\n" in rest:
            name, _, text = rest.strip().partition("\n")
        fenced = _FENCED.match(text.strip())
        arguments = _loaded(fenced[1] if fenced else text)
        if not name.strip() or not isinstance(arguments, dict):
            return None
        calls.append(Call(name.strip(), _dumped(arguments)))
    return None if _DEEPSEEK_CALL.sub("", body).strip() else calls or None


def read_kimi(body: str, parameters: Parameters) -> list[Call] | None:
    """Calls between marks, each `functions.name:number` and JSON."""
    calls: list[Call] = []
    for found in _KIMI_CALL.finditer(body):
        if not isinstance(arguments := _loaded(found[2]), dict):
            return None
        calls.append(Call(found[1], _dumped(arguments)))
    return None if _KIMI_CALL.sub("", body).strip() else calls or None


def read_list(body: str, parameters: Parameters) -> list[Call] | None:
    """A list of objects, or one, of a name and arguments."""
    return _calls(_loaded(body))


def read_bare(body: str, parameters: Parameters) -> list[Call] | None:
    """Objects of a name and parameters, with `;` or nothing between them; every name must be that of a tool."""
    calls = _calls(_values(body))
    return calls if calls and all(call.name in parameters for call in calls) else None


def read_pythonic(body: str, parameters: Parameters) -> list[Call] | None:
    """A list of calls as Python writes them: `[name(key="value"), other()]`; every name must be that of a tool."""
    try:
        expression = ast.parse(body.strip(), mode="eval").body
        nodes = expression.elts if isinstance(expression, ast.List) else [expression]
        calls = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args or (name := ast.unparse(node.func)) not in parameters:
                return None
            arguments = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg is not None}
            if len(arguments) != len(node.keywords):
                return None
            calls.append(Call(name, _dumped(arguments)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return calls or None


def _values(body: str) -> list[Any]:
    """JSON values with `;`, a comma or nothing between them, those of lists among them; none where it is not that."""
    values: list[Any] = []
    position = 0
    body = body.strip()
    while position < len(body):
        try:
            value, position = _DECODER.raw_decode(body, position)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
        while position < len(body) and body[position] in " \t\r\n;,":
            position += 1
    return values


def _loaded(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _dumped(value: Any) -> str:
    """As JSON; half of a surrogate pair stays escaped, since no answer could hold it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if _is_text(text) else json.dumps(value)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _calls(value: Any) -> list[Call] | None:
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        if not (isinstance(entry, dict) and isinstance(name := entry.get("name"), str) and name and _is_text(name)):
            return None
        arguments: Any = next((entry[key] for key in ("arguments", "parameters", "args") if key in entry), {})
        text = arguments if isinstance(arguments, str) and _is_text(arguments) else _dumped(arguments)
        calls.append(Call(name, text))
    return calls or None


# --- values that are written as text between tags ---


def _typed(pairs: list[tuple[str, str]], properties: Mapping[str, Any]) -> dict[str, Any]:
    return {key.strip(): _value(text, _types(properties.get(key.strip()))) for key, text in pairs}


def _types(schema: Any) -> set[str]:
    """The types that a JSON schema allows, as far as it names them."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {kind for kind in named or () if isinstance(kind, str)}
    if not types and isinstance(schema.get("enum"), list) and all(isinstance(one, str) for one in schema["enum"]):
        return {"string"}
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            types |= _types(choice)
    return types


def _value(text: str, types: set[str]) -> Any:
    """A text as a value of one of the types; as it is where it is none of them, or may be a text."""
    value = _loaded(text)
    if value is _NOT_JSON:
        value = _PYTHON_CONSTANTS.get(text.strip(), _NOT_JSON)
        if value is _NOT_JSON and types & {"array", "object"}:
            value = _literal(text)
    if not types:
        return text if value is _NOT_JSON else value
    allowed = tuple(kind for name in types - {"string"} for kind in _JSON_TYPES.get(name, ()))
    is_bool = isinstance(value, bool)
    fits = value is not _NOT_JSON and isinstance(value, allowed) and (not is_bool or "boolean" in types)
    return value if fits else text


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text.strip())
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _NOT_JSON
