"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.openai.fields import MAX_LOGPROBS, GenerationFields, OpenAIBody, ResponseFormat

MAX_TOOLS = 128
NoValue = Annotated[None, Meta(description="Not supported.")]
Echoed = Annotated[Any, Meta(description="What client libraries add to an answer, and send back: not read.")]
FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class ContentPart(OpenAIBody, kw_only=True):
    """A part of a message. Parts of text are read; other kinds are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None
    cache_control: Any = None
    image_url: Any = None
    input_audio: Any = None
    audio_url: Any = None
    video_url: Any = None
    file: Any = None
    file_id: Any = None
    file_data: Any = None
    filename: Any = None
    detail: Any = None


class FunctionCall(OpenAIBody, kw_only=True):
    """A function that was called, its arguments as JSON text."""

    name: str
    arguments: str = ""
    parsed_arguments: Echoed = None


class ToolCall(OpenAIBody, kw_only=True):
    """A call of a tool, as an answer told it."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    provider_specific_fields: Echoed = None
    extra_content: Echoed = None


class ChatMessage(OpenAIBody, kw_only=True):
    """A message of a conversation; what clients echo back from an answer may be null."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: Any = None
    audio: NoValue = None
    function_call: FunctionCall | None = None
    cache_control: Any = None
    parsed: Echoed = None
    provider_specific_fields: Echoed = None
    thinking_blocks: Echoed = None
    reasoning_details: Echoed = None

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, list):
            return "".join(part.text or part.refusal or "" for part in self.content)
        return self.content or self.refusal or ""


class FunctionDefinition(OpenAIBody, kw_only=True):
    """A function that a model may call, its parameters as a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(OpenAIBody, kw_only=True):
    """A tool that a model may call."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: Any = None


class FunctionChoice(OpenAIBody, kw_only=True):
    """The name of a function."""

    name: str


class NamedTool(OpenAIBody, kw_only=True):
    """The name of a tool."""

    function: FunctionChoice
    type: Literal["function"] = "function"


class AllowedTools(OpenAIBody, kw_only=True):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(OpenAIBody, kw_only=True):
    """The tool that must be called, or those that may be."""

    type: Literal["function", "allowed_tools"] = "function"
    function: FunctionChoice | None = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(GenerationFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Variables of the model's chat template.")
    ] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    audio: NoValue = None
    function_call: Annotated[
        Literal["none", "auto"] | FunctionChoice | None, Meta(description="As tool_choice was called, with functions.")
    ] = None
    functions: (
        Annotated[list[FunctionDefinition], Meta(max_length=MAX_TOOLS, description="As tools were called before.")]
        | None
    ) = None
    modalities: list[Literal["text"]] | None = None
    prediction: NoValue = None
    verbosity: Annotated[
        Literal["low", "medium", "high"] | None,
        Meta(description="A variable of the model's chat template; without effect where that has none of the name."),
    ] = None
    web_search_options: NoValue = None

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
