"""Tools and a format of the answer in one request, as agents ask: a call may be made, and an answer has the format."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.chat.offered import Offer
from jupyter_llmcloud.inference.openai.requests import decode_chat
from jupyter_llmcloud.inference.openai.structured.constraint import Constraints
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from tests.support.tiny_models import byte_level_tokenizer

BYTES = LLTokenizer("byte")
SCHEMA = {
    "type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"], "additionalProperties": False,
}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    "schema": {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}},
    "object": {"type": "json_object"},
    "regex": {"type": "regex", "pattern": r'\{"sunny": (true|false)\}'},
    # As huggingface_hub writes a json_schema, and text-generation-inference and llama.cpp have them written.
    "value": {"type": "json_object", "value": SCHEMA},
    "json": {"type": "json", "value": SCHEMA},
    "schema beside": {"type": "json_object", "schema": SCHEMA},
    "regex value": {"type": "regex", "value": r'\{"sunny": (true|false)\}'},
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("weather", "news")]
ANSWER = '{"sunny": true}'
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def offer(**fields: Any) -> Offer:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}
    return Offer.of(decode_chat(json.dumps(body).encode()))


def may_be(offered: Offer, text: str) -> bool:
    """Whether an answer may be this text, as a whole."""
    assert offered.grammar is not None
    matcher, tokens = LLMatcher(BYTES, offered.grammar.text), BYTES.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_may_call_a_tool_or_answer_in_the_format(form: str) -> None:
    both = offer(response_format=FORMATS[form], tools=TOOLS)
    assert may_be(both, ANSWER) and may_be(both, CALL) and may_be(both, f"{CALL}\n{CALL}")
    assert not may_be(both, "It is sunny.") and not may_be(both, f"{ANSWER}\n{CALL}")
    one_at_a_time = offer(response_format=FORMATS[form], tools=TOOLS, parallel_tool_calls=False)
    assert may_be(one_at_a_time, CALL) and not may_be(one_at_a_time, f"{CALL}\n{CALL}")
    for fields in ({"tool_choice": "none", "tools": TOOLS}, {}):
        alone = offer(response_format=FORMATS[form], **fields)
        assert may_be(alone, ANSWER) and not may_be(alone, CALL)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "object"])
def test_an_answer_of_another_form_is_not_possible(form: str) -> None:
    assert not may_be(offer(response_format=FORMATS[form]), '{"rain": true}')


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "json_object", "value": "a+"}, "response_format.value"),
        ({"type": "regex", "value": SCHEMA}, "response_format.value"),
        ({"type": "regex", "value": "a", "pattern": "b"}, "response_format.value"),
        ({"type": "json_object", "value": SCHEMA, "schema": SCHEMA}, "response_format.value"),
        ({"type": "json_schema", "json_schema": {"name": "a"}, "value": SCHEMA}, "response_format.value"),
        ({"type": "text", "schema": SCHEMA}, "response_format.schema"),
    ],
    ids=str,
)
def test_a_form_that_is_said_twice_or_means_nothing_is_refused(form: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        offer(response_format=form)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_of_a_call_that_must_be_made_the_format_says_nothing(choice: Any) -> None:
    forced = offer(response_format=FORMATS["schema"], tools=TOOLS, tool_choice=choice)
    assert may_be(forced, CALL) and not may_be(forced, ANSWER)
    with pytest.raises(ApiError) as caught:
        offer(structured_outputs={"regex": "a"}, tools=TOOLS, tool_choice=choice)
    assert caught.value.param == "structured_outputs.regex"


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "loop", "schema": {"$ref": "#"}}}},
        {"response_format": {"type": "regex", "pattern": r"[^\s\S]"}},
        {"structured_outputs": {"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}}},
    ],
    ids=["a schema that is only itself", "no character at all", "a field that must be and cannot"],
)
def test_a_format_that_no_text_can_have_is_refused_before_anything_is_generated(asked: dict[str, Any]) -> None:
    tokenizer = byte_level_tokenizer()
    loaded = LoadedModel(
        model=None, tokenizer=tokenizer, context_length=64, num_vocabulary=len(tokenizer), eos=frozenset({1}),
        is_encoder_decoder=False,
    )  # fmt: skip
    grammar = offer(**asked).grammar
    assert grammar is not None
    with pytest.raises(ApiError, match="cannot be enforced") as caught:
        Constraints(loaded, Vocabulary(tokenizer)).new(grammar.text, grammar.param)
    assert (caught.value.status, caught.value.code) == (400, "invalid_grammar")


NODE = {"type": "object", "properties": {"value": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["value"],
        "additionalProperties": False}  # fmt: skip
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
         "additionalProperties": False}  # fmt: skip
REFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "the whole": (NODE, '{"value": 1, "next": {"value": 2}}'),
    "another property": (
        {"type": "object", "properties": {"start": PLACE, "default": {"$ref": "#/properties/start"}},
         "additionalProperties": False},
        '{"start": {"city": "Oslo"}, "default": {"city": "Rome"}}',
    ),
    "a definition of a schema that has an id": (
        {"$id": "https://example.org/a", "type": "object", "properties": {"to": {"$ref": "#/$defs/Place"}},
         "$defs": {"Place": PLACE}, "additionalProperties": False},
        '{"to": {"city": "Oslo"}}',
    ),
    "a definition alone": ({"$ref": "#/definitions/Place", "definitions": {"Place": PLACE}}, '{"city": "Oslo"}'),
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCES)
def test_references_in_the_parameters_of_a_tool_find_what_they_name(case: str) -> None:
    parameters, arguments = REFERENCES[case]
    tools = [{"type": "function", "function": {"name": "go", "parameters": parameters}}]
    forced = offer(tools=tools, tool_choice="required")

    def call(arguments: str) -> str:
        return f'<tool_call>\n{{"name": "go", "arguments": {arguments}}}\n</tool_call>'

    assert may_be(forced, call(arguments))
    assert not may_be(forced, call('{"value": 1, "next": {"name": "go", "arguments": {"value": 2}}}'))


@pytest.mark.parametrize(
    "schema",
    [
        {"const": {"$ref": "#/a"}},
        {"enum": [{"$ref": "#/a"}, 1]},
        {"type": "object", "properties": {"const": {"$ref": "#/$defs/text"}}, "required": ["const"]},
    ],
    ids=["const", "enum", "a property that is called const"],
)
def test_a_value_that_looks_like_a_reference_is_none(schema: dict[str, Any]) -> None:
    parameters = {
        "type": "object",
        "properties": {"x": schema},
        "required": ["x"],
        "$defs": {"text": {"type": "string"}},
    }
    tools = [{"type": "function", "function": {"name": "go", "parameters": parameters}}]
    value = '{"const": "text"}' if "properties" in schema else '{"$ref": "#/a"}'
    call = f'<tool_call>\n{{"name": "go", "arguments": {{"x": {value}}}}}\n</tool_call>'
    assert may_be(offer(tools=tools, tool_choice="required"), call)


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb c", "a/b\\n"])
def test_a_text_that_python_has_escaped_is_the_one_that_the_expression_matches(text: str) -> None:
    escaped = offer(structured_outputs={"regex": re.escape(text)})
    assert may_be(escaped, text)
    assert "\n" not in text or not may_be(escaped, text.replace("\n", "\\n"))


def test_a_schema_without_a_word_asks_for_json_and_a_choice_may_be_any_text() -> None:
    anything = offer(guided_json={})
    assert may_be(anything, '[1, "a"]') and not may_be(anything, "free text")
    assert may_be(offer(guided_choice=["a\x7fb", "c"]), "a\x7fb")
