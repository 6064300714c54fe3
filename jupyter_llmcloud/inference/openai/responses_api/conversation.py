"""A body of POST /v1/responses as a chat: items to messages, its tools and formats in the words of chat."""

from __future__ import annotations

from typing import Any

import msgspec

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.openai.requests import check_chat
from jupyter_llmcloud.protocol.openai.chat import (
    AllowedTools,
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionCall,
    FunctionChoice,
    FunctionDefinition,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)
from jupyter_llmcloud.protocol.openai.decoding import invalid, unsupported
from jupyter_llmcloud.protocol.openai.fields import JsonSchemaFormat, ResponseFormat
from jupyter_llmcloud.protocol.openai.responses import (
    InputItem,
    InputPart,
    ResponseRequest,
    ResponseToolChoice,
    TextFormat,
)

_WITH_LOGPROBS = "message.output_text.logprobs"
# Told back as they were sent, or taken for the sake of a client: nothing else comes of them.
_WITHOUT_EFFECT = ("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "max_tool_calls")


def without_effect(request: ResponseRequest) -> list[str]:
    """The names of parameters that were sent, are accepted, and change nothing."""
    named = [name for name in _WITHOUT_EFFECT if getattr(request, name) is not None]
    if request.service_tier not in (None, "auto", "default"):
        named.append("service_tier")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        named.append("stream_options.include_obfuscation")
    if request.reasoning is not None:
        named += [f"reasoning.{one}" for one in ("summary", "generate_summary") if getattr(request.reasoning, one)]
    return named + [f"include.{one}" for one in request.include or () if one != _WITH_LOGPROBS]


def input_items(request: ResponseRequest) -> list[InputItem]:
    """The new items of a request."""
    if request.input is None:
        raise ApiError(400, "Parameter 'input' is missing.", param="input", code="missing_required_parameter")
    if isinstance(request.input, str):
        return [InputItem(type="message", role="user", content=request.input)]
    return request.input


def as_chat(request: ResponseRequest, earlier: list[InputItem]) -> ChatRequest:
    """The conversation so far with what is asked now; raises `ApiError` 400 for what is not possible here."""
    if request.background:
        raise unsupported("background", "answers are not made in the background here. Leave it out.")
    items = input_items(request)
    messages = [ChatMessage(role="system", content=request.instructions)] if request.instructions else []
    for index, item in enumerate([*earlier, *items]):
        _add(item, messages, f"input[{index - len(earlier)}]")
    if not messages:
        raise invalid("input", "input is empty: give at least one item.")
    wants_logprobs = _WITH_LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    effort = request.reasoning.effort if request.reasoning is not None else None
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logprobs=wants_logprobs or None,
        top_logprobs=request.top_logprobs if wants_logprobs else None,
        tools=[_tool(tool) for tool in request.tools or ()],
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_format(request.text.format if request.text is not None else None),
        reasoning_effort=effort,
        verbosity=request.text.verbosity if request.text is not None else None,
        stream=request.stream,
    )
    check_chat(chat)
    return chat


def _add(item: InputItem, messages: list[ChatMessage], place: str) -> None:
    kind = item.type or ("message" if item.role is not None else None)
    if kind == "message":
        if item.role is None:
            raise invalid(f"{place}.role", f"{place}.role is missing.")
        messages.append(ChatMessage(role=item.role, content=_content(item.content, place)))
    elif kind == "function_call":
        call = ToolCall(
            id=item.call_id,
            function=FunctionCall(name=_required(item.name, f"{place}.name"), arguments=item.arguments or ""),
        )
        if messages and messages[-1].role == "assistant":
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
        else:
            messages.append(ChatMessage(role="assistant", content=None, tool_calls=[call]))
    elif kind == "function_call_output":
        output = _content(_required(item.output, f"{place}.output"), place, "output")
        messages.append(ChatMessage(role="tool", content=output, tool_call_id=item.call_id))
    elif kind == "reasoning":
        return  # of an answer before: models are not shown what they thought
    else:
        raise unsupported(f"{place}.type", f"items of type {str(kind)[:60]!r} are not understood here.")


def _content(content: Any, place: str, name: str = "content") -> str | list[ContentPart]:
    if content is None:
        raise invalid(f"{place}.{name}", f"{place}.{name} must be a string or a list of parts, not null.")
    if isinstance(content, str):
        return content
    return [_part(part, f"{place}.{name}[{number}]") for number, part in enumerate(content)]


def _part(part: InputPart, place: str) -> ContentPart:
    if part.type not in ("input_text", "output_text", "text", "refusal"):
        message = f"{place} is of type {part.type[:60]!r}: this model reads text only. Send parts of type 'input_text'."
        raise ApiError(400, message, param=place, code="unsupported_content")
    return ContentPart(type="text", text=_required(part.text or part.refusal or "", f"{place}.text"))


def _required(value: Any, place: str) -> Any:
    if value is None:
        raise invalid(place, f"{place} is missing.")
    return value


def _tool(tool: Any) -> Tool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: Any) -> Any:
    if not isinstance(choice, ResponseToolChoice):
        return choice
    if choice.type == "function":
        return ToolChoice(function=FunctionChoice(name=_required(choice.name, "tool_choice.name")))
    tools = [
        NamedTool(function=FunctionChoice(name=tool.name)) for tool in _required(choice.tools, "tool_choice.tools")
    ]
    return ToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=choice.mode or "auto", tools=tools))


def _format(form: TextFormat | None) -> ResponseFormat | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return ResponseFormat(type="json_object")
    if form.schema is None:
        raise invalid("text.format.schema", "text.format.schema is missing.")
    schema = JsonSchemaFormat(name=form.name or "answer", schema=form.schema, strict=form.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)


def as_items(output: list[dict[str, Any]]) -> list[InputItem]:
    """What an answer said, as items of the next request."""
    return [msgspec.convert(item, InputItem) for item in output]
