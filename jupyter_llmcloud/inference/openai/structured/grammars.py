"""What a request asks of the form of its answer, as a grammar of llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from jupyter_llmcloud.inference.openai.chat.tool_formats import HERMES
from jupyter_llmcloud.protocol.openai.chat import Tool
from jupyter_llmcloud.protocol.openai.decoding import invalid
from jupyter_llmcloud.protocol.openai.fields import JsonSchemaFormat, ResponseFormat, StructuredOutputs

# One way to write a value: else an answer could go on for ever with white space.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ARGUMENTS = "#/properties/arguments"
_VALUES = ("const", "enum", "default", "examples", "example")  # keywords of a schema that hold none
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # that hold some
_BETWEEN_SLASHES = {"/": "\\/", "\n": "\\n", "\r": "\\r"}


class Grammar(NamedTuple):
    """A grammar, and the parameter that asks for it.

    Attributes:
        rule: the same as the body of a rule in Lark's notation; "" where it is a grammar of several rules.
    """

    text: str
    param: str
    rule: str = ""


def grammar_of(form: ResponseFormat | None, structured: StructuredOutputs | None) -> Grammar | None:
    """What the two parameters of a format ask for; raises `ApiError` 400 where they contradict or lack something."""
    asked = structured is not None and bool(_given(structured))
    if form is not None:
        _check_fields(form)
    if form is not None and form.type != "text":
        if asked:
            raise invalid("structured_outputs", "structured_outputs and response_format exclude each other.")
        return _of_response_format(form)
    return _of_structured_outputs(structured) if structured is not None and asked else None


def _of_response_format(form: ResponseFormat) -> Grammar:
    if form.type in ("json_object", "json"):
        schema, param = _alternative(form, "schema", dict)
        return _json({"type": "object"}, "response_format") if schema is None else _json(schema, param)
    if form.type == "json_schema":
        schema = _required(form.json_schema, "response_format.json_schema")
        return json_schema_grammar(schema, "response_format.json_schema.schema")
    if form.type == "regex":
        pattern, param = _alternative(form, "pattern", str)
        return Grammar(regex_grammar(_required(pattern, param)), param, f"/{_escaped(pattern)}/")
    text = _required(form.grammar, "response_format.grammar")
    return Grammar(_lark(text), "response_format.grammar")


def _check_fields(form: ResponseFormat) -> None:
    """Raise ApiError for a schema or pattern that would not be looked at."""
    for name, kinds in (("schema", ("json_object", "json")), ("value", ("json_object", "json", "regex"))):
        if getattr(form, name) is not None and form.type not in kinds:
            param = f"response_format.{name}"
            raise invalid(param, f"{param} is not for type {form.type!r}: {' or '.join(kinds)} has it.")


def _alternative(form: ResponseFormat, name: str, kind: type) -> tuple[Any, str]:
    """A parameter that `value` may stand for, as text-generation-inference has it, and its name."""
    if form.value is None:
        return getattr(form, name), f"response_format.{name}"
    param = "response_format.value"
    if getattr(form, name) is not None:
        raise invalid(param, f"{param} and response_format.{name} exclude each other.")
    if not isinstance(form.value, kind):
        wanted = "a JSON schema (an object)" if kind is dict else "a regular expression (a string)"
        raise invalid(param, f"{param} must be {wanted} with type {form.type!r}.")
    return form.value, param


def json_schema_grammar(form: JsonSchemaFormat, param: str) -> Grammar:
    """JSON of a schema; any object where there is none."""
    return _json({"type": "object"} if form.schema is None else form.schema, param)


def _json(schema: dict[str, Any], param: str) -> Grammar:
    return Grammar(json_grammar(schema), param, f"%json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}")


def _given(asked: StructuredOutputs) -> list[str]:
    """What is asked for. A schema without a word is one: any JSON follows it."""
    return [name for name in asked.__struct_fields__ if getattr(asked, name) or (name == "json" and asked.json == {})]


def _of_structured_outputs(asked: StructuredOutputs) -> Grammar:
    given = _given(asked)
    if len(given) > 1:
        raise invalid("structured_outputs", f"structured_outputs has {' and '.join(given)}: give one of them.")
    param = f"structured_outputs.{given[0]}"
    if asked.json is not None:
        return Grammar(json_grammar(_schema(asked.json, param)), param)
    if asked.regex:
        return Grammar(regex_grammar(asked.regex), param)
    if asked.choice:
        return Grammar(_lark("start: " + " | ".join(_literal(text) for text in asked.choice)), param)
    if asked.grammar:
        return Grammar(_lark(asked.grammar), param)
    return Grammar(json_grammar({"type": "object"}), param)


def call_grammar(tools: Sequence[Tool], *, parallel: bool) -> Grammar:
    """Calls of these tools, and nothing else: what a forced call is written as, whatever the family of the model."""
    param = "tools" if len(tools) > 1 else "tools[0].function.parameters"
    return Grammar(_lark("\n".join(["start: calls", *_call_rules(tools, parallel)])), param)


def either_grammar(answer: Grammar, tools: Sequence[Tool], *, parallel: bool) -> Grammar:
    """An answer in its format, or calls of these tools. The answer's grammar must have a rule."""
    rules = ["start: answer | calls", f"answer: {answer.rule}", *_call_rules(tools, parallel)]
    return Grammar(_lark("\n".join(rules)), answer.param)


def _call_rules(tools: Sequence[Tool], parallel: bool) -> list[str]:
    names = [f"call_{number}" for number in range(len(tools))]
    rules = [f"calls: one{' (' + _literal(chr(10)) + ' one)*' if parallel else ''}"]
    opens, closes = _literal(f"{HERMES.opens}\n"), _literal(f"\n{HERMES.closes}")
    rules.append(f"one: {opens} ({' | '.join(names)}) {closes}")
    rules += [f"{name}: %json {json.dumps(_call_schema(tool))}" for name, tool in zip(names, tools, strict=True)]
    return rules


def _call_schema(tool: Tool) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": _moved(parameters)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": _JSON_OPTIONS,
    }


def _moved(parameters: dict[str, Any]) -> dict[str, Any]:
    """A schema as the one of `arguments` in another: its references find in there what they found in it.

    An `$id` would make a root of it again, in which they find nothing.
    """
    return _with_references({key: value for key, value in parameters.items() if key != "$id"})


def _with_references(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_references(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _reference(key, value) for key, value in schema.items()}


def _reference(key: str, value: Any) -> Any:
    if key in _VALUES:
        return value
    if key in _BY_NAME and isinstance(value, dict):
        return {name: _with_references(part) for name, part in value.items()}
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return f"{_ARGUMENTS}{value[1:]}"
    return _with_references(value)


def json_grammar(schema: dict[str, Any]) -> str:
    """JSON that satisfies a schema."""
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": _JSON_OPTIONS}}]})


def regex_grammar(pattern: str) -> str:
    """Text that a regular expression matches as a whole."""
    return json.dumps({"grammars": [{"lark_grammar": f"start: /{_escaped(pattern)}/"}]})


def without_forcing(grammar: str) -> str:
    """The same grammar for a vocabulary that cannot spell every text.

    Where only one text can come next, llguidance takes its tokens for chosen, and does not see that a token may begin
    there and reach further: that there is one for " the", and none for a space.
    """
    parts = [_not_forced(part) for part in json.loads(grammar)["grammars"]]
    return json.dumps({"grammars": parts})


def _not_forced(part: dict[str, Any]) -> dict[str, Any]:
    text = part["lark_grammar"] if "lark_grammar" in part else f"start: %json {json.dumps(part['json_schema'])}"
    return {"lark_grammar": text if "%llguidance" in text else f'%llguidance {{"no_forcing": true}}\n{text}'}


def _lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _escaped(pattern: str) -> str:
    """A pattern between slashes: those of its own are escaped, and so are the ends of lines, unless they were."""
    shown, escaped = [], False
    for character in pattern:
        told = _BETWEEN_SLASHES.get(character, character)
        shown.append(told[1:] if escaped and len(told) > 1 else told)
        escaped = character == "\\" and not escaped
    return "".join(shown)


def _schema(value: dict[str, Any] | str, param: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise invalid(param, f"{param} must be a JSON schema, as an object or as JSON text.") from None
    if not isinstance(value, dict):
        raise invalid(param, f"{param} must be a JSON schema, as an object or as JSON text.")
    return value


def _required(value: Any, param: str) -> Any:
    if value is None:
        raise invalid(param, f"{param} is missing: this type of response_format needs it.")
    return value
