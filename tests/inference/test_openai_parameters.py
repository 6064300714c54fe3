"""Every parameter that OpenAI's API has today is honoured, accepted and said to be without effect, or refused by name.

The names are those of the installed `openai` client, so that a new one is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.openai.requests import check_chat, decode_chat, decode_completion, without_effect
from jupyter_llmcloud.inference.openai.responses_api.conversation import as_chat
from jupyter_llmcloud.inference.openai.responses_api.conversation import without_effect as response_without_effect
from jupyter_llmcloud.protocol.openai.decoding import decode
from jupyter_llmcloud.protocol.openai.embeddings import EmbeddingRequest
from jupyter_llmcloud.protocol.openai.responses import ResponseRequest

MESSAGES = [{"role": "user", "content": "Hello"}]
PARAMETERS = {"type": "object", "properties": {}}


def response_effects(body: bytes) -> list[str]:
    request = decode(body, ResponseRequest)
    check_chat(as_chat(request, []))
    return response_without_effect(request)


def embedding_effects(body: bytes) -> list[str]:
    decode(body, EmbeddingRequest)
    return []


# For each route: the parameters of OpenAI, the least body, and what checks a body and tells what is without effect.
ROUTES: dict[str, tuple[Any, dict[str, Any], Callable[[bytes], list[str]]]] = {
    "completions": (
        completion_create_params.CompletionCreateParamsBase,
        {"model": "m", "prompt": "p"},
        lambda body: without_effect(decode_completion(body)),
    ),
    "chat/completions": (
        chat_create_params.CompletionCreateParamsBase,
        {"model": "m", "messages": MESSAGES},
        lambda body: without_effect(decode_chat(body)),
    ),
    "responses": (
        response_create_params.ResponseCreateParamsBase,
        {"model": "m", "input": "Hello"},
        response_effects,
    ),
    "embeddings": (
        embedding_create_params.EmbeddingCreateParams,
        {"model": "m", "input": "Hello"},
        embedding_effects,
    ),
}
FUNCTION = {"name": "f", "parameters": PARAMETERS}
# What each may be. HONOURED: with a value of it; SAID: accepted, and named as without effect; REFUSED: a 400 that names it.
HONOURED: dict[str, dict[str, Any]] = {
    "completions": {
        "model": "m", "prompt": "p", "echo": True, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logprobs": 5,
        "logit_bias": {"1": 1}, "max_tokens": 3, "n": 2, "seed": 1, "stop": ["x"], "temperature": 0.5, "top_p": 0.5,
        "stream": True, "stream_options": {"include_usage": True}, "user": "u", "best_of": 1, "suffix": "",
    },
    "chat/completions": {
        "model": "m", "messages": MESSAGES, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logprobs": True,
        "logit_bias": {"1": 1}, "max_tokens": 3, "max_completion_tokens": 3, "n": 2, "seed": 1, "stop": "x",
        "temperature": 0.5, "top_p": 0.5, "top_logprobs": 3, "stream": True, "stream_options": {"include_usage": True},
        "user": "u", "response_format": {"type": "json_object"}, "reasoning_effort": "low", "tool_choice": "auto",
        "tools": [{"type": "function", "function": FUNCTION}], "parallel_tool_calls": True, "modalities": ["text"],
        "service_tier": "auto", "verbosity": "medium", "function_call": {"name": "f"}, "functions": [FUNCTION],
    },
    "responses": {
        "model": "m", "input": "Hello", "instructions": "x", "max_output_tokens": 3, "metadata": {"a": "b"},
        "parallel_tool_calls": False, "previous_response_id": "resp_1", "reasoning": {"effort": "low"}, "store": False,
        "stream": True, "stream_options": {}, "temperature": 0.5, "top_p": 0.5, "top_logprobs": 3,
        "text": {"format": {"type": "json_object"}}, "tools": [{"type": "function", **FUNCTION}], "tool_choice": "auto",
        "include": ["message.output_text.logprobs"], "truncation": "auto", "service_tier": "default", "user": "u",
        "background": False,
    },
    "embeddings": {"model": "m", "input": ["a"], "dimensions": 4, "encoding_format": "base64", "user": "u"},
}  # fmt: skip
SAID: dict[str, dict[str, Any]] = {
    "completions": {},
    "chat/completions": {
        "store": True, "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "x",
        "prompt_cache_retention": "24h", "service_tier": "flex", "verbosity": "low",
    },
    "responses": {
        "service_tier": "flex",
        "safety_identifier": "x", "prompt_cache_key": "x", "prompt_cache_retention": "24h", "max_tool_calls": 3,
    },
    "embeddings": {},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "completions": {"best_of": 3, "suffix": "end"},
    "chat/completions": {
        "audio": {"voice": "x"}, "prediction": {"type": "content"},
        "web_search_options": {}, "modalities": ["audio"], "moderation": {},
        "prompt_cache_options": {},
    },
    "responses": {
        "background": True, "conversation": "c", "prompt": {"id": "p"},
        "access_programs": [], "background_options": {}, "context_management": [], "image": {}, "moderation": {},
        "prompt_cache_options": {},
    },
    "embeddings": {},
}  # fmt: skip
NEEDED = {"top_logprobs": {"logprobs": True}, "stream_options": {"stream": True}, "tool_choice": {},
          "function_call": {"functions": [FUNCTION]}}  # fmt: skip


def body_of(route: str, name: str, value: Any) -> bytes:
    return json.dumps({**ROUTES[route][1], **NEEDED.get(name, {}), name: value}).encode()


def cases(table: dict[str, dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(route, name, value) for route, values in table.items() for name, value in values.items()]


@pytest.mark.parametrize("route", ROUTES)
def test_every_parameter_of_openais_client_is_in_the_table(route: str) -> None:
    known = {*ROUTES[route][0].__annotations__}
    assert known <= {*HONOURED[route], *SAID[route], *REFUSED[route]}


@pytest.mark.parametrize(("route", "name", "value"), cases(HONOURED))
def test_what_is_honoured_is_accepted_without_a_word(route: str, name: str, value: Any) -> None:
    if route == "responses" and name == "top_logprobs":
        body = body_of(route, "include", ["message.output_text.logprobs"])
    else:
        body = body_of(route, name, value)
    assert ROUTES[route][2](body) == []


@pytest.mark.parametrize(("route", "name", "value"), cases(SAID))
def test_what_changes_nothing_is_accepted_and_said(route: str, name: str, value: Any) -> None:
    assert ROUTES[route][2](body_of(route, name, value)) == [name]


@pytest.mark.parametrize(("route", "name", "value"), cases(REFUSED))
def test_what_is_not_possible_is_a_400_that_names_it(route: str, name: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        ROUTES[route][2](body_of(route, name, value))
    assert caught.value.status == 400 and (caught.value.param or "").partition("[")[0] == name
    assert name in caught.value.message


@pytest.mark.parametrize(("fields", "said"), [
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]}, "tools.function.strict"),
])  # fmt: skip
def test_parts_of_parameters_that_change_nothing_are_said_too(fields: dict[str, Any], said: str) -> None:
    request = decode_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())
    assert without_effect(request) == [said]


def test_what_a_response_may_include_beside_log_probabilities_is_said_to_be_without_effect() -> None:
    body = {"model": "m", "input": "x", "include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}
    assert response_effects(json.dumps(body).encode()) == ["reasoning.summary", "include.reasoning.encrypted_content"]
    with pytest.raises(ApiError) as caught:
        response_effects(json.dumps({**body, "include": ["x\r\nSet-Cookie: a=b"]}).encode())
    assert caught.value.param == "include[0]"


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(case=st.sampled_from(cases(HONOURED) + cases(SAID) + cases(REFUSED)), value=ANYTHING)
def test_a_value_of_any_kind_is_taken_or_refused_by_the_name_of_its_parameter(
    case: tuple[str, str, Any], value: Any
) -> None:
    route, name, _ = case
    try:
        ROUTES[route][2](json.dumps({**ROUTES[route][1], name: value}).encode("utf-8", "surrogatepass"))
    except ApiError as error:
        assert error.status == 400 and error.message
        named = (error.param or "").partition("[")[0].partition(".")[0]
        assert named in (name, "max_completion_tokens") or error.code == "invalid_json", (error.param, error.message)


@pytest.mark.parametrize(
    ("name", "only", "other"),
    [
        ("skip_special_tokens", True, False), ("spaces_between_special_tokens", True, False),
        ("include_stop_str_in_output", False, True), ("use_beam_search", False, True), ("length_penalty", 1.0, 0.8),
        ("return_tokens_as_token_ids", False, True), ("return_token_ids", False, True), ("best_of", 1, 2),
        ("early_stopping", False, True), ("detokenize", True, False), ("priority", 0, 3), ("add_special_tokens", True, False),
    ],
)  # fmt: skip
def test_what_is_always_so_here_may_be_asked_for_and_its_opposite_is_refused(name: str, only: Any, other: Any) -> None:
    for value in (only, None):
        decode_completion(body_of("completions", name, value))
    with pytest.raises(ApiError, match="only") as refused:
        decode_completion(body_of("completions", name, other))
    assert refused.value.param == name


def test_special_tokens_of_a_conversation_are_those_of_its_template() -> None:
    decode_chat(body_of("chat/completions", "add_special_tokens", False))
    with pytest.raises(ApiError, match="only false"):
        decode_chat(body_of("chat/completions", "add_special_tokens", True))


def test_what_load_generators_send_for_a_completion_limits_it() -> None:
    body = {"model": "m", "prompt": "p", "max_tokens": 6, "max_completion_tokens": 5, "stop": None, "ignore_eos": True}
    assert decode_completion(json.dumps(body).encode()).token_limit == ("max_completion_tokens", 5)
    with pytest.raises(ApiError, match="max_completion_tokens"):
        decode_completion(json.dumps({**body, "max_completion_tokens": -1}).encode())


def test_a_function_whose_name_is_none_is_refused_by_what_names_are_made_of() -> None:
    tool = {"type": "function", "function": {"name": "get weather"}}
    with pytest.raises(ApiError) as caught:
        decode_chat(
            json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}).encode()
        )
    told = "tools[0].function.name must be 1 to 128 letters of ASCII, digits, '_', '.', ':' or '-' (\"get weather\")."
    assert caught.value.message == told
