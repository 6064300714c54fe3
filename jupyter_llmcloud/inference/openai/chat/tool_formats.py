"""How models write the calls of tools: what opens and closes a call, and how what stands between is read.

A family is known by what its chat template writes when it shows the model an earlier call: see `format_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.inference.openai.chat.call_readers import (
    Call,
    Parameters,
    read_bare,
    read_deepseek,
    read_glm,
    read_hermes,
    read_kimi,
    read_list,
    read_mistral,
    read_pythonic,
)
from jupyter_llmcloud.inference.openai.chat.history import knows_tools
from jupyter_llmcloud.protocol.openai.chat import Tool


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models calls tools.

    Attributes:
        opens: what comes before a call; "" where a whole answer is a call.
        closes: what comes after it; "" where the end of the answer ends it.
        read: the calls in what stands between; None when there is none.
        is_json: whether a call is one JSON object of a name and arguments, which can be read while it is written.
        bare: characters with which an answer begins that is a call as a whole, without anything that opens it.
        marks: special tokens inside a call, which its reader must see.
        id_length: characters of a call's id, where templates insist on a number.
    """

    name: str
    opens: str
    closes: str
    read: Callable[[str, Parameters], list[Call] | None]
    is_json: bool = False
    bare: str = ""
    marks: tuple[str, ...] = ()
    id_length: int = 29

    @property
    def tags(self) -> tuple[str, ...]:
        """Everything that a tokenizer may hold for special and that means something here."""
        return tuple(tag for tag in (self.opens, self.closes, *self.marks) if tag)


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", read_hermes, is_json=True)
GLM = ToolFormat("glm", "<tool_call>", "</tool_call>", read_glm,
                 marks=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))  # fmt: skip
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", read_mistral, marks=("[ARGS]", "[CALL_ID]"), id_length=9)
DEEPSEEK = ToolFormat(
    "deepseek", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", read_deepseek,
    marks=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)  # fmt: skip
KIMI = ToolFormat(
    "kimi", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", read_kimi,
    marks=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)  # fmt: skip
PIPED_LIST = ToolFormat("list", "<|tool_call|>", "<|/tool_call|>", read_list)
PYTHON_TAG = ToolFormat("llama", "<|python_tag|>", "", read_bare, bare="{")
PYTHONIC = ToolFormat("pythonic", "<|python_start|>", "<|python_end|>", read_pythonic, bare="[")
BARE_JSON = ToolFormat("json", "", "", read_bare, bare="{[")

# What a chat template shows of a family, and its format; the first that is found counts.
_FAMILIES: tuple[tuple[str, ToolFormat], ...] = (
    ("<｜tool▁calls▁begin｜>", DEEPSEEK),
    ("<|tool_calls_section_begin|>", KIMI),
    ("[TOOL_CALLS]", MISTRAL),
    ("<arg_key>", GLM),
    ("<tool_call>", HERMES),  # also Qwen's, whose coders write XML inside
    ("<|tool_call|>", PIPED_LIST),  # Phi-4 mini, Granite
    ("[func_name1(", PYTHONIC),  # Llama 4, and the small ones of Llama 3.2
    ("<|python_tag|>", PYTHON_TAG),
)

# Between which models of a family reason. DeepSeek, Qwen and most others; Mistral's; Seed's.
_THINK_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


def think_tags_of(template: str | None) -> tuple[str, str] | None:
    """The tags between which a model reasons, where its chat template shows them."""
    return next((tags for tags in _THINK_TAGS if template is not None and tags[1] in template), None)


def format_of(template: str | None) -> ToolFormat:
    """The format that a chat template shows; for one that knows no tools, the format that we tell the model."""
    if template is None or not knows_tools(template):
        return HERMES
    return next((form for shown, form in _FAMILIES if shown in template), BARE_JSON)


def parameters_of(tools: Sequence[Tool]) -> dict[str, Mapping[str, Any]]:
    """The schemas of the parameters of each tool, by name."""
    return {tool.function.name: (tool.function.parameters or {}).get("properties") or {} for tool in tools}
