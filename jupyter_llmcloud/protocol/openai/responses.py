"""The body of POST /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.openai.chat import FunctionName, NoValue
from jupyter_llmcloud.protocol.openai.fields import MAX_LOGPROBS, OpenAIBody, ServiceTier

DEFAULT_LISTED, MAX_LISTED = 20, 100  # items of a page
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]


class InputPart(OpenAIBody, kw_only=True):
    """A part of a message. Parts of text are read; other kinds are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None
    image_url: Any = None
    detail: Any = None
    file_id: Any = None
    file_data: Any = None
    file_url: Any = None
    filename: Any = None
    input_audio: Any = None
    video_url: Any = None


class InputItem(OpenAIBody, kw_only=True):
    """A message, a function's call, its output, or reasoning: what earlier answers held, and what is new."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    encrypted_content: Any = None
    namespace: NoValue = None
    phase: Any = None
    created_by: Any = None


class ResponseTool(OpenAIBody, kw_only=True):
    """A function that a model may call."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedTool(OpenAIBody, kw_only=True):
    """The name of a function."""

    name: str
    type: Literal["function"] = "function"


class ResponseToolChoice(OpenAIBody, kw_only=True):
    """The function that must be called, or those that may be."""

    type: Literal["function", "allowed_tools"] = "function"
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ResponseNamedTool], Meta(min_length=1)] | None = None


class TextFormat(OpenAIBody, kw_only=True):
    """The format of a text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(OpenAIBody, kw_only=True):
    """How a text is written."""

    format: TextFormat | None = None
    verbosity: Annotated[Literal["low", "medium", "high"] | None, Meta(description="As that of a chat.")] = None


class ReasoningOptions(OpenAIBody, kw_only=True):
    """How much a model thinks before it answers."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Annotated[Any, Meta(description="Accepted without effect.")] = None
    generate_summary: Annotated[Any, Meta(description="Accepted without effect.")] = None


class ResponseStreamOptions(OpenAIBody, kw_only=True):
    """Options of a stream."""

    include_obfuscation: bool | None = None


class ResponseRequest(OpenAIBody, kw_only=True):
    """The body of POST /v1/responses."""

    model: str
    input: str | list[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: (
        Annotated[int, Meta(ge=1, description="Of tools that run here, of which there are none.")] | None
    ) = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Includable] | None = None
    metadata: dict[str, str] | None = None
    truncation: Annotated[
        Literal["disabled", "auto"] | None,
        Meta(description="auto: what was said first is left out where the conversation is too long for the model."),
    ] = None
    background: Annotated[bool | None, Meta(description="Only false.")] = None
    service_tier: ServiceTier | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Annotated[Any, Meta(description="Accepted without effect.")] = None
    conversation: NoValue = None
    prompt: NoValue = None
