"""How models write the calls of tools: what opens and closes a call, and how what stands between is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jupyter_llmcloud.inference.openai.chat.history import knows_tools
from jupyter_llmcloud.protocol.openai.chat import Tool

_XML_CALL = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)
_MISTRAL_CALL = re.compile(r"\s*([A-Za-z0-9_.:-]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")


class Call(NamedTuple):
    """A call of a tool, its arguments as JSON text."""

    name: str
    arguments: str


Parameters = Mapping[str, Mapping[str, Any]]  # JSON schemas of the parameters of each tool


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models calls tools.

    Attributes:
        opens: what comes before a call; "" where a whole answer is a call.
        closes: what comes after it; "" where the end of the answer ends it.
        read: the calls in what stands between; None when there is none.
        is_json: whether a call is one JSON object of a name and arguments, which can be read while it is written.
        id_length: characters of a call's id, where templates insist on a number.
    """

    name: str
    opens: str
    closes: str
    read: Callable[[str, Parameters], list[Call] | None]
    is_json: bool = False
    id_length: int = 29


def format_of(template: str | None) -> ToolFormat:
    """The format that a chat template shows; for one that knows no tools, the format that we tell the model."""
    if template is None or not knows_tools(template):
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return HERMES
    return PYTHON_TAG if "<|python_tag|>" in template else BARE_JSON


def parameters_of(tools: Sequence[Tool]) -> dict[str, Mapping[str, Any]]:
    """The schemas of the parameters of each tool, by name."""
    return {tool.function.name: (tool.function.parameters or {}).get("properties") or {} for tool in tools}


def read_hermes(body: str, parameters: Parameters) -> list[Call] | None:
    """`{"name": ..., "arguments": {...}}`, or as Qwen's coders write it `<function=name><parameter=key>value`."""
    if "<function=" in body:
        return [
            Call(found[1], json.dumps(_xml_arguments(found[2], parameters.get(found[1], {})), ensure_ascii=False))
            for found in _XML_CALL.finditer(body)
        ]
    return _calls(_loaded(body))


def read_mistral(body: str, parameters: Parameters) -> list[Call] | None:
    """A list of `{"name": ..., "arguments": {...}}`, or `name[ARGS]{...}`, which may be repeated."""
    if isinstance(value := _loaded(body), list):
        return _calls(value)
    calls: list[Call] = []
    for part in body.split("[TOOL_CALLS]"):
        position = 0
        while found := _MISTRAL_CALL.match(part, position):
            try:
                arguments, position = json.JSONDecoder().raw_decode(part, found.end())
            except (ValueError, RecursionError):
                return None
            calls.append(Call(found[1], json.dumps(arguments, ensure_ascii=False)))
        if part[position:].strip():
            return None
    return calls or None


def read_bare(body: str, parameters: Parameters) -> list[Call] | None:
    """Objects of a name and parameters, with `;` or nothing between them; every name must be that of a tool."""
    decoder, values, position = json.JSONDecoder(), [], 0
    body = body.strip()
    while position < len(body):
        try:
            value, position = decoder.raw_decode(body, position)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        while position < len(body) and body[position] in " \t\r\n;":
            position += 1
    calls = _calls(values)
    return calls if calls and all(call.name in parameters for call in calls) else None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _calls(value: Any) -> list[Call] | None:
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
            return None
        arguments: Any = next((entry[key] for key in ("arguments", "parameters", "args") if key in entry), {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(Call(entry["name"], text))
    return calls or None


def _xml_arguments(body: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for found in _XML_PARAMETER.finditer(body):
        kind = properties.get(found[1], {})
        is_text = isinstance(kind, dict) and kind.get("type") == "string"
        value = None if is_text else _loaded(found[2])
        arguments[found[1]] = found[2] if value is None and found[2].strip() != "null" else value
    return arguments


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", read_hermes, is_json=True)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", read_mistral, id_length=9)
PYTHON_TAG = ToolFormat("llama", "<|python_tag|>", "", read_bare)
BARE_JSON = ToolFormat("json", "", "", read_bare)
