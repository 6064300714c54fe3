"""What a client may ask of a generation, by value: what cannot be honoured is a 400 that names the parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.base import Sampling
from jupyter_llmcloud.protocol.openai.chat import (
    AllowedTools,
    ChatMessage,
    ChatRequest,
    FunctionChoice,
    Tool,
    ToolChoice,
)
from jupyter_llmcloud.protocol.openai.completions import CompletionRequest
from jupyter_llmcloud.protocol.openai.decoding import decode, invalid, unsupported
from jupyter_llmcloud.protocol.openai.fields import GenerationFields, StructuredOutputs

AnyRequest = CompletionRequest | ChatRequest
WITHOUT_EFFECT = (
    "store", "metadata", "safety_identifier", "cache_control", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text")
# Fields of a request that an engine may be unable to honour, with the names of its own and what asks for nothing.
_OF_THE_ENGINE: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("min_p", "min_p", (None, 0)),
    ("repetition_penalty", "repetition_penalty", (None, 1)),
    ("min_tokens", "min_tokens", (None, 0)),
    ("ignore_eos", "ignore_eos", (None, False)),
    ("stop_token_ids", "stop_token_ids", (None, [])),
    ("seed", "seed", (None,)),
    ("top_k", "top_k", (None, 0, -1)),
    ("logit_bias", "logit_bias", (None, {})),
    ("presence_penalty", "presence_penalty", (None, 0)),
    ("frequency_penalty", "frequency_penalty", (None, 0)),
    ("logprobs", "num_logprobs", (None, False)),
)
# What other servers can change, and is always so here: asking for just that is fine.
_ALWAYS_SO: tuple[tuple[str, Any], ...] = (
    ("skip_special_tokens", True),
    ("spaces_between_special_tokens", True),
    ("include_stop_str_in_output", False),
    ("use_beam_search", False),
    ("length_penalty", 1),
    ("return_tokens_as_token_ids", False),
    ("return_token_ids", False),
    ("early_stopping", False),
    ("detokenize", True),
    ("priority", 0),
)


def decode_completion(body: bytes) -> CompletionRequest:
    """Decode and check the body of a completion; raises `ApiError` 400."""
    request = decode(body, CompletionRequest)
    if request.best_of not in (None, 1) or isinstance(request.best_of, bool):
        raise unsupported("best_of", "only 1 is possible. Ask for n answers and choose among them.")
    if request.suffix not in (None, ""):
        raise unsupported("suffix", "text is not inserted here, it is continued. Leave it out.")
    _check_common(request)
    return request


def decode_chat(body: bytes) -> ChatRequest:
    """Decode and check the body of a chat completion; raises `ApiError` 400."""
    request = decode(body, ChatRequest)
    check_chat(request)
    return request


def check_chat(request: ChatRequest) -> None:
    """Check a chat completion by value; raises `ApiError` 400."""
    _check_common(request)
    if request.max_tokens == 0:
        raise invalid("max_tokens", "max_tokens must be at least 1 (0).")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs=true.")
    _take_functions(request)
    _check_choice(request)
    for index, message in enumerate(request.messages):
        _check_message(message, index)
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise invalid(
                "add_generation_prompt", "add_generation_prompt and continue_final_message exclude each other."
            )
        if request.messages[-1].role != "assistant":
            raise invalid("continue_final_message", "continue_final_message needs a last message of the assistant.")


def _take_functions(request: ChatRequest) -> None:
    """`functions` and `function_call` as the tools that they became. One of them is called at a time."""
    if not request.functions:
        if isinstance(request.function_call, FunctionChoice):
            raise invalid("function_call", "function_call names a function, but there are no functions.")
        return
    for name in ("tools", "tool_choice"):
        if getattr(request, name):
            raise invalid(name, f"{name} and functions exclude each other: functions is the older name of tools.")
    request.tools = [Tool(type="function", function=function) for function in request.functions]
    asked, known = request.function_call, [function.name for function in request.functions]
    if isinstance(asked, FunctionChoice) and asked.name not in known:
        message = f"function_call names {asked.name[:128]!r}, but functions has {', '.join(known)}."
        raise invalid("function_call.name", message)
    request.tool_choice = ToolChoice(function=asked) if isinstance(asked, FunctionChoice) else asked
    request.parallel_tool_calls = False


def _check_choice(request: ChatRequest) -> None:
    """What `tool_choice` names is there; of tools that are not allowed, the model is not told."""
    choice = request.tool_choice
    if not isinstance(choice, ToolChoice):
        return
    if choice.type == "function":
        if choice.function is None:
            raise ApiError(400, "Parameter 'tool_choice.function' is missing.", param="tool_choice.function",
                           code="missing_required_parameter")  # fmt: skip
        return
    if choice.allowed_tools is None:
        raise ApiError(400, "Parameter 'tool_choice.allowed_tools' is missing.", param="tool_choice.allowed_tools",
                       code="missing_required_parameter")  # fmt: skip
    _allow_only(request, choice.allowed_tools)


def _allow_only(request: ChatRequest, allowed: AllowedTools) -> None:
    names = [tool.function.name for tool in allowed.tools]
    known = {tool.function.name for tool in request.tools or ()}
    for index, name in enumerate(names):
        if name not in known:
            place = f"tool_choice.allowed_tools.tools[{index}].function.name"
            raise invalid(place, f"{place} is {name[:128]!r}, which is none of the tools.")
    request.tools = [tool for tool in request.tools or () if tool.function.name in names]
    request.tool_choice = allowed.mode


def _check_message(message: ChatMessage, index: int) -> None:
    if isinstance(message.content, list):
        for number, part in enumerate(message.content):
            if part.type not in _TEXT_PARTS or (part.text is None and not part.refusal):
                _refuse_part(part.type, f"messages[{index}].content[{number}]")
    if message.role != "assistant":
        _check_no_answer(message, index)


def _check_no_answer(message: ChatMessage, index: int) -> None:
    """A message that is not the assistant's says something, and calls nothing."""
    if message.content is None:
        place = f"messages[{index}].content"
        raise invalid(place, f"{place} must be a string or a list of parts, not null.")
    if message.function_call is not None:
        place = f"messages[{index}].function_call"
        raise invalid(place, f"{place}: only the assistant calls functions.")
    if message.tool_calls:
        place = f"messages[{index}].tool_calls"
        raise invalid(place, f"{place}: only the assistant calls tools, not {message.role}.")


def _refuse_part(kind: str, place: str) -> None:
    if kind not in _TEXT_PARTS:
        message = f"{place} is of type {kind[:60]!r}: this model reads text only. Send parts of type 'text'."
        raise ApiError(400, message, param=place, code="unsupported_content")
    raise invalid(f"{place}.text", f"{place}.text is missing.")


def check_engine(request: GenerationFields, cannot: frozenset[str]) -> None:
    """Raise `ApiError` 400 when the request asks for what the engine says it cannot do."""
    for param, field, neutral in _OF_THE_ENGINE:
        if field in cannot and getattr(request, param, None) not in neutral:
            raise unsupported(param, "the engine of this endpoint cannot do it. Leave it out.")


def without_effect(request: GenerationFields, template: str | None = None) -> list[str]:
    """The names of parameters that were sent, are accepted, and change nothing. `template`: of the model's chats."""
    named = [name for name in WITHOUT_EFFECT if getattr(request, name) not in (None, False, {})]
    if request.service_tier not in (None, "auto", "default"):
        named.append("service_tier")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        named.append("stream_options.include_obfuscation")
    if isinstance(request, ChatRequest):
        if request.verbosity in ("low", "high") and "verbosity" not in (template or ""):
            named.append("verbosity")
        if request.tool_choice in (None, "auto") and any(tool.function.strict for tool in request.tools or ()):
            named.append("tools.function.strict")
        if any(_has_cache_control(message) for message in request.messages):
            named.append("messages.cache_control")
        if any(tool.cache_control is not None for tool in request.tools or ()):
            named.append("tools.cache_control")
    return named


def _has_cache_control(message: ChatMessage) -> bool:
    parts = message.content if isinstance(message.content, list) else []
    return message.cache_control is not None or any(part.cache_control is not None for part in parts)


def sampling_of(request: AnyRequest, defaults: Mapping[str, float], vocabulary: int) -> Sampling:
    """The request's sampling; what it does not say comes from `defaults`, else from OpenAI's."""

    def value(name: str, neutral: float) -> float:
        asked = getattr(request, name)
        return defaults.get(name, neutral) if asked is None else asked

    return Sampling(
        temperature=float(value("temperature", 1.0)),
        top_p=float(value("top_p", 1.0)),
        top_k=max(0, int(value("top_k", 0))),
        min_p=float(value("min_p", 0.0)),
        seed=request.seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=float(value("repetition_penalty", 1.0)),
        logit_bias=_logit_bias(request.logit_bias or {}, vocabulary),
        num_logprobs=request.num_logprobs,
    )


def stop_token_ids(request: GenerationFields, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end an answer; raises `ApiError` 400 for one that the model does not know."""
    for token in request.stop_token_ids or ():
        if token >= vocabulary:
            raise invalid("stop_token_ids", f"stop_token_ids names {token}: token ids are 0 to {vocabulary - 1}.")
    return tuple(request.stop_token_ids or ())


def _logit_bias(biases: Mapping[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    found = []
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12) or int(key) >= vocabulary:
            raise invalid("logit_bias", f"logit_bias names {key[:60]!r}: token ids are 0 to {vocabulary - 1}.")
        found.append((int(key), float(bias)))
    return tuple(found)


def _check_common(request: AnyRequest) -> None:
    request.structured_outputs = _structured_outputs(request)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options needs stream=true.")
    if request.includes_usage_so_far and not request.include_usage:
        needed = "stream_options.continuous_usage_stats needs stream_options.include_usage=true."
        raise invalid("stream_options.continuous_usage_stats", needed)
    # A conversation has the special tokens that its template writes; a prompt gets those of the tokenizer.
    of_the_route = ("add_special_tokens", not isinstance(request, ChatRequest))
    for name, only in (*_ALWAYS_SO, of_the_route):
        if (asked := getattr(request, name)) is not None and asked != only:
            raise unsupported(name, f"only {json.dumps(only)} is possible here. Leave it out.")
    param, limit = request.token_limit
    if request.min_tokens and limit is not None and request.min_tokens > limit:
        raise invalid("min_tokens", f"min_tokens is {request.min_tokens}, more than {param}={limit}.")


def _structured_outputs(request: GenerationFields) -> StructuredOutputs | None:
    """The format that is asked for in the words that vLLM's clients have, or had before: guided_json and so on."""
    names = [name for name in ("json", "regex", "choice", "grammar") if getattr(request, f"guided_{name}") is not None]
    if not names:
        return request.structured_outputs
    if request.structured_outputs is not None:
        raise invalid(f"guided_{names[0]}", f"guided_{names[0]} and structured_outputs exclude each other.")
    return StructuredOutputs(**{name: getattr(request, f"guided_{name}") for name in names})
