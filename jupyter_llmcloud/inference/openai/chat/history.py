"""The messages of a conversation as a chat template takes them, with tools for a template that knows none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jupyter_llmcloud.protocol.openai.chat import ChatMessage, FunctionDefinition, Tool, ToolCall
from jupyter_llmcloud.protocol.openai.decoding import invalid

_TOOLS = re.compile(r"\btools\b")
_CALLS = re.compile(r"\btool_calls\b")
_ROLES = {"developer": "system", "function": "tool"}  # that templates know by another name
_INSTRUCTION = """You may call these functions. Their signatures are between <tools></tools>:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON between <tool_call></tool_call>:
<tool_call>
{{"name": "<name>", "arguments": {{<arguments>}}}}
</tool_call>"""


def chat_template_of(tokenizer: Any, has_tools: bool) -> str | None:
    """The template that a tokenizer has, of several the one for tools where there are some."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    choose = getattr(tokenizer, "get_chat_template", None)
    return str(choose(tools=[{}] if has_tools else None) if choose is not None else template)


def knows_tools(template: str | None) -> bool:
    """Whether a chat template shows a model its tools."""
    return template is not None and _TOOLS.search(template) is not None


def as_template_messages(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], template: str | None
) -> list[dict[str, Any]]:
    """The messages as dictionaries. What a template does not know of tools is written into the texts of messages."""
    rows = [_as_dict(message, index) for index, message in enumerate(messages)]
    if template is None or not _CALLS.search(template):
        rows = [_without_calls(row) for row in rows]
    if tools and not knows_tools(template):
        rows = _with_instruction(rows, _INSTRUCTION.format(tools="\n".join(_described(tool) for tool in tools)))
    return rows


def as_template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as a chat template takes them."""
    return [{"type": "function", "function": _definition(tool.function)} for tool in tools]


def _definition(function: FunctionDefinition) -> dict[str, Any]:
    parameters = function.parameters or {"type": "object", "properties": {}}
    return {"name": function.name, "description": function.description or "", "parameters": parameters}


def _described(tool: Tool) -> str:
    return json.dumps({"type": "function", "function": _definition(tool.function)}, ensure_ascii=False)


def _as_dict(message: ChatMessage, index: int) -> dict[str, Any]:
    row: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": message.text}
    if message.name:
        row["name"] = message.name
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    if reasoning := message.reasoning_content or message.reasoning:
        row["reasoning_content"] = reasoning
    if message.tool_calls:
        row["tool_calls"] = [
            _call(call, f"messages[{index}].tool_calls[{number}]") for number, call in enumerate(message.tool_calls)
        ]
    elif message.function_call is not None:  # as calls were written before they were those of tools
        row["tool_calls"] = [
            _call(ToolCall(function=message.function_call), f"messages[{index}].function_call", "arguments")
        ]
    return row


def _call(call: ToolCall, place: str, name: str = "function.arguments") -> dict[str, Any]:
    """Templates write the arguments as JSON themselves: they are given values, not text."""
    arguments: Any = {}
    if call.function.arguments.strip():
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            param = f"{place}.{name}"
            raise invalid(param, f'{param} must be JSON text, such as \'{{"city": "Paris"}}\'.') from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def _without_calls(row: dict[str, Any]) -> dict[str, Any]:
    """Calls and their results as texts, for a template that would drop or refuse them."""
    if row["role"] != "tool" and "tool_calls" not in row:
        return row
    if row["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{row['content']}\n</tool_response>"}
    calls = row.pop("tool_calls", ())
    texts = [row["content"]] if row["content"] else []
    texts += [f"<tool_call>\n{json.dumps(_named(call), ensure_ascii=False)}\n</tool_call>" for call in calls]
    return {**row, "content": "\n".join(texts)}


def _named(call: dict[str, Any]) -> dict[str, Any]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}


def _with_instruction(rows: list[dict[str, Any]], instruction: str) -> list[dict[str, Any]]:
    """Into the system message, where there is one; else into the first one: a template may refuse the system's role."""
    first, *others = rows
    return [{**first, "content": f"{instruction}\n\n{first['content']}".rstrip()}, *others]
