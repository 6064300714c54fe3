"""What the replica accepts: every parameter is honoured, neutral, or refused with its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.base import Sampling
from jupyter_llmcloud.inference.openai.chat.history import as_template_messages
from jupyter_llmcloud.inference.openai.prompts import plain_template
from jupyter_llmcloud.inference.openai.requests import decode_chat, decode_completion, sampling_of
from jupyter_llmcloud.protocol.openai import decoding
from jupyter_llmcloud.protocol.openai.chat import ChatRequest
from jupyter_llmcloud.protocol.openai.completions import CompletionRequest

MESSAGES = [{"role": "user", "content": "Hello"}]
# What the body of a completion has not.
OF_CHATS = [name.encode() for name in ChatRequest.__struct_fields__ if name not in CompletionRequest.__struct_fields__]


def completion(**fields: Any) -> Any:
    return decode_completion(json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def chat(**fields: Any) -> Any:
    return decode_chat(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"max_tokens": "ten"}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"best_of": 4}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_completion_parameter_that_cannot_be_honoured_is_a_400_that_names_it(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        sampling_of(completion(**fields), {}, vocabulary=100)
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(param)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"prompt": "p"}, "prompt"),
    ],
)
def test_a_chat_parameter_that_cannot_be_honoured_is_a_400_that_names_it(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, (caught.value.param or "").split("[")[0].split(".")[0]) == (400, param)


def test_values_that_ask_for_nothing_are_accepted() -> None:
    common: dict[str, Any] = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 1, "user": "me", "seed": None,
        "metadata": {"a": "b"}, "store": False, "stop": None, "stream": False, "stream_options": None,
        "service_tier": "auto", "logprobs": None, "safety_identifier": "x", "prompt_cache_key": "k",
    }  # fmt: skip
    completion(**common, echo=False, best_of=1, suffix=None)
    chat(**{**common, "logprobs": False}, tools=[], tool_choice="none", response_format={"type": "text"})
    assert sampling_of(chat(**common), {}, 100) == Sampling()
    assert chat(top_logprobs=0).num_logprobs is None


def test_what_is_not_known_here_may_be_null_wherever_it_stands() -> None:
    called = {"name": "f", "arguments": "{}", "parsed_arguments": None}
    said = {"role": "assistant", "content": "x", "parsed": None, "tool_calls": [{"id": "a", "function": called}]}
    history = [said, {"role": "user", "content": "y"}, said]
    asked = chat(messages=history, new_of_2027=None, chat_template_kwargs={"a": None})
    assert [message.content for message in asked.messages] == ["x", "y", "x"]
    assert asked.messages[0].tool_calls is not None and asked.messages[0].tool_calls[0].function.name == "f"
    assert asked.chat_template_kwargs == {"a": None}


def test_many_unknown_nulls_cost_no_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], decoding.msgspec.json.decode
    monkeypatch.setattr(decoding.msgspec.json, "decode", lambda body: decoded.append(body) or decode(body))
    nothing = {f"new_{number}": None for number in range(50)}
    asked = chat(messages=[{"role": "user", "content": "x", **nothing}] * 100)
    assert len(asked.messages) == 100 and len(decoded) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "m", "prompt": "p", "new": 0}', "new"),
        (b'{"model": "m", "prompt": "p", "new": null, "newer": false}', "newer"),
        (b'{"model": "m", "prompt": null, "new": null}', "prompt"),
        (b'{"model": "m", "new": null, "prompt": ' + b"[" * 5000, "new"),
        (b'{"model": "m", "prompt": "p", "logit_bias": {"5": 101}}', "logit_bias"),
        (b'{"model": "m", "prompt": "p", ' + b", ".join(b'"%s": null' % name for name in OF_CHATS) + b"}", None),
    ],
)
def test_what_is_not_known_here_and_asks_for_something_is_named(body: bytes, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        decode_completion(body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b'"text"', b"[" * 5000])
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decode_completion(body)
    assert caught.value.status == 400


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ApiError, match="'prompt' is missing") as caught:
        decode_completion(b'{"model": "m"}')
    assert caught.value.param == "prompt"


def test_what_a_request_leaves_open_comes_from_the_model_and_then_from_openai() -> None:
    recommended = {"temperature": 0.6, "top_k": 20}
    assert sampling_of(completion(temperature=0), recommended, 100) == Sampling(temperature=0.0, top_k=20)
    assert sampling_of(completion(top_k=-1), recommended, 100) == Sampling(temperature=0.6)


def test_max_completion_tokens_comes_before_max_tokens() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).token_limit == ("max_completion_tokens", 7)
    assert chat(max_tokens=5).token_limit == ("max_tokens", 5)
    assert completion().token_limit == ("max_tokens", 16)


def test_content_parts_and_echoed_nulls_are_read_as_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "audio": None}
    request = chat(messages=[{"role": "developer", "content": parts}, echoed])
    assert [message.text for message in request.messages] == ["ab", "c"]


def test_a_part_may_be_an_empty_text_but_not_without_one() -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": ""}, {"type": "text", "text": "Hello"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "Hello"
    with pytest.raises(ApiError) as caught:
        chat(messages=[*MESSAGES, {"role": "user", "content": [*parts, {"type": "text"}]}])
    assert caught.value.param == "messages[1].content[2].text"


def test_without_a_chat_template_the_messages_are_joined_as_text() -> None:
    request = chat(messages=[{"role": "system", "content": "One."}, {"role": "user", "content": "Two"}])
    assert plain_template([message.text for message in request.messages]) == "One.\nTwo"
    assert plain_template(["Hello"]) == "Hello"


def test_what_client_libraries_add_to_an_answer_may_come_back_with_it() -> None:
    """As openai's parse(), litellm, OpenRouter's and Gemini's clients do: it is not told to the model."""
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}}
    call = {
        "id": "c",
        "type": "function",
        "function": function,
        "provider_specific_fields": {},
        "extra_content": {"x": 1},
    }
    plain = {
        "role": "assistant",
        "content": "yes",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    added = {"parsed": {"a": 1}, "provider_specific_fields": {"x": 1}, "thinking_blocks": [], "reasoning_details": [{}]}
    asked = [
        chat(messages=[{"role": "user", "content": "q"}, one])
        for one in (plain, {**plain, **added, "tool_calls": [call]})
    ]
    with_template = [as_template_messages(request.messages, [], None) for request in asked]
    assert with_template[0] == with_template[1]


def test_calls_as_they_were_written_before_there_were_tools_are_read() -> None:
    old = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
    ]
    rows = as_template_messages(chat(messages=[*MESSAGES, *old]).messages, [], "tool_calls")
    assert rows[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}} and rows[2]["role"] == "tool"
    with pytest.raises(ApiError, match=r"messages\[0\].function_call.arguments must be JSON"):
        broken = {**old[0], "function_call": {"name": "f", "arguments": "{"}}
        as_template_messages(chat(messages=[broken]).messages, [], "tool_calls")
    with pytest.raises(ApiError, match=r"messages\[0\].function_call"):
        chat(messages=[{"role": "user", "content": "q", "function_call": {"name": "f"}}])


@pytest.mark.parametrize(
    ("name", "value"),
    [("json", {"type": "object"}), ("regex", "a+"), ("choice", ["a", "b"]), ("grammar", "start: /a/")],
)
def test_a_format_may_be_asked_for_in_the_older_words_of_vllms_clients(name: str, value: Any) -> None:
    for ask in (completion, chat):
        told = ask(**{f"guided_{name}": value}).structured_outputs
        assert told == ask(structured_outputs={name: value}).structured_outputs
        with pytest.raises(ApiError, match="exclude"):
            ask(**{f"guided_{name}": value}, structured_outputs={name: value})
