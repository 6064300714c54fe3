"""What a client may ask, decoded strictly: a wrong type, name or value is a 400 that names the parameter."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.base import Sampling

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_LENGTH = 512

_PATH = re.compile(r"`\$\.?([^`]*)`")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""Parameters that are understood but not supported, with the values that ask for nothing."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both routes take."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Any = None
    service_tier: Any = None

    @property
    def num_choices(self) -> int:
        """How many answers to one prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> list[str]:
        """Stop strings, as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(_Common, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: Any = None
    best_of: Any = None
    suffix: Any = None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The parameter that limits the answer, and its value."""
        return "max_tokens", 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report for each token; None reports nothing."""
        return self.logprobs


class ContentPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message. Text only."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a conversation; the names that clients echo back from an answer may be null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Common, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The parameter that limits the answer, and its value; none means the rest of the context."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report for each token; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


AnyRequest = CompletionRequest | ChatRequest


def decode_completion(body: bytes) -> CompletionRequest:
    """Decode and check the body of a completion; raises `ApiError` 400."""
    request: CompletionRequest = _decode(body, CompletionRequest)
    _check_common(request)
    _check_range("logprobs", request.logprobs, 0, 5)
    return request


def decode_chat(body: bytes) -> ChatRequest:
    """Decode and check the body of a chat completion; raises `ApiError` 400."""
    request: ChatRequest = _decode(body, ChatRequest)
    _check_common(request)
    if not request.messages:
        raise _invalid("messages", "messages is empty: give at least one message.")
    _check_range("max_completion_tokens", request.max_completion_tokens, 1, None)
    _check_range("top_logprobs", request.top_logprobs, 0, 20)
    if request.top_logprobs is not None and not request.logprobs:
        raise _invalid("top_logprobs", "top_logprobs needs logprobs=true.")
    return request


def sampling_of(request: AnyRequest, defaults: dict[str, float], vocabulary: int) -> Sampling:
    """The request's sampling; what it does not say comes from `defaults`, else from OpenAI's."""

    def value(name: str, neutral: float) -> float:
        asked = getattr(request, name)
        return defaults.get(name, neutral) if asked is None else asked

    return Sampling(
        temperature=float(value("temperature", 1.0)),
        top_p=float(value("top_p", 1.0)),
        top_k=max(0, int(value("top_k", 0))),
        seed=request.seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}, vocabulary),
        num_logprobs=request.num_logprobs,
    )


def _logit_bias(biases: dict[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    found = []
    for key, bias in biases.items():
        if not key.isdecimal() or int(key) >= vocabulary:
            raise _invalid("logit_bias", f"logit_bias names {key!r}: token ids are 0 to {vocabulary - 1}.")
        _check_range("logit_bias", bias, -100, 100)
        found.append((int(key), float(bias)))
    return tuple(found)


def _decode(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_shape(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None


def _wrong_shape(message: str) -> ApiError:
    path = match.group(1) if (match := _PATH.search(message)) else ""
    if unknown := _UNKNOWN.search(message):
        param = f"{path}.{unknown.group(1)}".lstrip(".")
        text = f"Unknown parameter {param!r}: it is not supported here. Remove it."
        return ApiError(400, text, param=param, code="unknown_parameter")
    if missing := _MISSING.search(message):
        param = f"{path}.{missing.group(1)}".lstrip(".")
        return ApiError(400, f"Parameter {param!r} is missing.", param=param, code="missing_required_parameter")
    return ApiError(400, f"{message}.", param=path or None, code="invalid_type")


def _check_common(request: AnyRequest) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name, None)
        if not any(type(value) is type(item) and value == item for item in neutral):
            raise ApiError(
                400,
                f"{name}={_short(value)} is not supported by this endpoint. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    _check_range("temperature", request.temperature, 0, 2)
    _check_range("presence_penalty", request.presence_penalty, -2, 2)
    _check_range("frequency_penalty", request.frequency_penalty, -2, 2)
    _check_range("max_tokens", request.max_tokens, 1, None)
    _check_range("n", request.n, 1, MAX_CHOICES)
    _check_range("top_k", request.top_k, -1, None)
    _check_range("seed", request.seed, -(2**63), 2**63 - 1)
    if request.top_p is not None and not 0 < request.top_p <= 1:
        raise _invalid("top_p", f"top_p is {request.top_p}: it must be above 0 and at most 1.")
    _check_stops(request.stops)
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options", "stream_options needs stream=true.")


def _check_stops(stops: list[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise _invalid("stop", f"stop has {len(stops)} strings: at most {MAX_STOPS} are possible.")
    if any(not 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise _invalid("stop", f"every stop string must have 1 to {MAX_STOP_LENGTH} characters.")


def _check_range(name: str, value: float | None, low: float, high: float | None) -> None:
    if value is not None and not (low <= value and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise _invalid(name, f"{name} is {value}: it must be {bounds}.")


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
