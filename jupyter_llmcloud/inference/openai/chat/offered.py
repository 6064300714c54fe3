"""What a chat request offers and asks of tools and of the form of its answer, against one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.inference.openai.chat.answer_parser import AnswerParser, PlainParser, TaggedParser
from jupyter_llmcloud.inference.openai.chat.harmony import TAGS, HarmonyParser, is_harmony
from jupyter_llmcloud.inference.openai.chat.history import chat_template_of
from jupyter_llmcloud.inference.openai.chat.template_parser import TemplateParser
from jupyter_llmcloud.inference.openai.chat.tool_formats import (
    HERMES,
    ToolFormat,
    format_of,
    parameters_of,
    think_tags_of,
)
from jupyter_llmcloud.inference.openai.structured.grammars import Grammar, call_grammar, either_grammar, grammar_of
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary
from jupyter_llmcloud.protocol.openai.chat import ChatRequest, Tool, ToolChoice
from jupyter_llmcloud.protocol.openai.decoding import invalid


@dataclass(frozen=True)
class Offer:
    """The tools that may be called, and how an answer must look.

    Attributes:
        tools: those that the model may call.
        forced: whether it must call one of them.
        grammar: what the answer must follow, if anything.
    """

    tools: tuple[Tool, ...]
    forced: bool
    grammar: Grammar | None

    @classmethod
    def of(cls, request: ChatRequest) -> Offer:
        """What the request offers; raises `ApiError` 400 where that contradicts itself."""
        tools, choice = tuple(request.tools or ()), request.tool_choice
        names = [tool.function.name for tool in tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise invalid(f"tools[{index}].function.name", f"tools has two functions of the name {name!r}.")
        grammar = grammar_of(request.response_format, request.structured_outputs)
        named = choice.function.name if isinstance(choice, ToolChoice) and choice.function is not None else None
        if named is not None:
            tools = tuple(tool for tool in tools if tool.function.name == named)
            if not tools:
                known = f"tools has {', '.join(names)}" if names else "there are no tools"
                raise invalid("tool_choice.function.name", f"tool_choice names {named[:128]!r}, but {known}.")
        elif choice == "required" and not tools:
            raise invalid("tool_choice", "tool_choice is 'required', but there are no tools.")
        elif choice == "none":
            tools = ()
        forced = named is not None or choice == "required"
        parallel = named is None and request.parallel_tool_calls is not False
        if forced:
            # A response_format is that of a text, which is not written where a tool is called.
            if grammar is not None and request.structured_outputs is not None:
                raise invalid(grammar.param, f"{grammar.param} and a tool that must be called exclude each other.")
            grammar = call_grammar(tools, parallel=parallel)
        elif grammar is not None and tools and grammar.rule:
            grammar = either_grammar(grammar, tools, parallel=parallel)
        return cls(tools, forced, grammar)


@dataclass(frozen=True)
class Reading:
    """How an answer is read.

    Attributes:
        new_parser: makes what reads one choice.
        visible: special tokens that the parsers must see.
        reasoning_end: what ends the reasoning that the prompt has begun; "" where it has begun none.
    """

    new_parser: Callable[[], AnswerParser]
    visible: frozenset[int] = frozenset()
    reasoning_end: str = ""


def reading_of(offer: Offer, tokenizer: Any, vocabulary: Vocabulary, prompt: str) -> Reading:
    """How this model's answer to `prompt` is read."""
    template = chat_template_of(tokenizer, bool(offer.tools))
    think = think_tags_of(template)
    is_thinking = think is not None and prompt.rstrip().endswith(think[0])
    reasoning_end = think[1] if think is not None and is_thinking else ""
    own = getattr(tokenizer, "response_template", None)
    calls_by_grammar = bool(offer.tools) and offer.grammar is not None  # which writes them as HERMES does
    if own is not None and not calls_by_grammar and (offer.tools or think or own.get("fields")):
        described = [tool_as_dict(tool) for tool in offer.tools]
        return Reading(
            lambda: TemplateParser(tokenizer.get_response_parser(prefix=prompt, tools=described or None)),
            frozenset(vocabulary.special),
            reasoning_end,
        )
    if is_harmony(template) and offer.grammar is None:
        names = frozenset(tool.function.name for tool in offer.tools)
        return Reading(lambda: HarmonyParser(prompt, names), _visible(vocabulary, TAGS))
    form: ToolFormat | None = None
    if offer.tools:
        form = HERMES if calls_by_grammar else format_of(template)
    if form is None and think is None:
        return Reading(PlainParser)
    parameters = parameters_of(offer.tools)
    return Reading(
        lambda: TaggedParser(form, parameters, think=think, is_thinking=is_thinking, is_forced=offer.forced),
        _visible(vocabulary, (*(think or ()), *(form.tags if form else ()))),
        reasoning_end,
    )


def _visible(vocabulary: Vocabulary, tags: Sequence[str]) -> frozenset[int]:
    return frozenset(token for token, text in vocabulary.special.items() if text and text in tags)


def tool_as_dict(tool: Tool) -> dict[str, Any]:
    """A tool as OpenAI's API writes it."""
    return {"type": "function", "function": {"name": tool.function.name, "parameters": tool.function.parameters or {}}}
