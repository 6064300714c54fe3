"""Prompts to token ids, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.chat.history import (
    as_template_messages,
    as_template_tools,
    chat_template_of,
    knows_tools,
)
from jupyter_llmcloud.inference.openai.chat.templates import TemplateFailed, Templates
from jupyter_llmcloud.inference.openai.prompt_length import are_too_many, check_length, encode, too_many
from jupyter_llmcloud.protocol.openai.chat import ChatRequest, Tool
from jupyter_llmcloud.protocol.openai.completions import CompletionRequest

# Arguments of the function that renders: a request must not set them.
_RESERVED = frozenset({
    "conversations", "messages", "chat_template", "tools", "return_assistant_tokens_mask",
    "continue_final_message", "add_generation_prompt", "tokenize",
})  # fmt: skip


def completion_prompts(
    request: CompletionRequest, loaded: LoadedModel, max_sequences: int | None = None
) -> list[list[int]]:
    """The token ids of every prompt of the request: a text, texts, token ids, or lists of them.

    Args:
        max_sequences: how many answers one request may ask for.
    """
    items = _separate(request.prompt, "prompt")
    wanted = len(items) * request.num_choices
    if max_sequences is not None and wanted > max_sequences:
        message = f"{wanted} sequences in one request: at most {max_sequences}. Send several requests."
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return _all_token_ids(items, loaded, "prompt")


def token_ids_of(given: str | list[Any], loaded: LoadedModel, param: str, max_items: int) -> list[list[int]]:
    """The token ids of every text of a parameter, of which there may be so many; each text whole, with its end."""
    items = _separate(given, param)
    if len(items) > max_items:
        message = f"{param} has {len(items)} texts: at most {max_items} are possible."
        raise ApiError(400, message, param=param, code="invalid_value")
    return _all_token_ids(items, loaded, param, goes_on=False)


def _all_token_ids(items: list[Any], loaded: LoadedModel, param: str, *, goes_on: bool = True) -> list[list[int]]:
    if not items:
        raise ApiError(400, f"{param} is an empty list.", param=param, code="invalid_value")
    for text in items:
        if isinstance(text, str):
            check_length(text, loaded, param)
    return [_checked(_token_ids(item, loaded, goes_on), loaded, param) for item in items]


class ChatPrompt(NamedTuple):
    """A conversation as the model reads it: its tokens, and its text."""

    tokens: list[int]
    text: str


def chat_prompt(
    request: ChatRequest, loaded: LoadedModel, templates: Templates | None = None, *, must_fit: bool = True
) -> ChatPrompt:
    """A conversation through the model's chat template, or else through `plain_template`.

    Args:
        templates: what renders; without it, a process is started for this conversation alone.
        must_fit: refuse one that is far too long, by its beginning.
    """
    tools = [] if request.tool_choice == "none" else request.tools or []
    template = chat_template_of(loaded.tokenizer, bool(tools))
    with nullcontext(templates) if templates is not None else closing(Templates()) as renderer:
        if must_fit:
            _check_number(request.messages, loaded, renderer, template)
        return _chat_prompt(request, tools, loaded, renderer, template, must_fit)


class _Said(Protocol):
    """A message of a chat, or an item of a response."""

    role: Any
    content: Any


def check_number(messages: Sequence[_Said], loaded: LoadedModel, templates: Templates | None) -> None:
    """Refuse a conversation that is far too long by its number of messages; raises `ApiError` 400.

    To copy and render ten thousand messages takes a tenth of a second, for nothing.
    """
    if templates is not None:
        _check_number(messages, loaded, templates, chat_template_of(loaded.tokenizer, False))


def _check_number(messages: Sequence[_Said], loaded: LoadedModel, templates: Templates, template: str | None) -> None:
    if not are_too_many(len(messages), loaded):
        return
    num_said = sum(message.role in ("user", "assistant") and bool(message.content) for message in messages)
    if not are_too_many(num_said, loaded):
        return
    special = dict(loaded.tokenizer.special_tokens_map) if template is not None else {}
    if template is None or (not _has_code_of_its_own(loaded.tokenizer) and templates.shows_all(template, special)):
        raise too_many(len(messages), loaded, "messages")


def _chat_prompt(
    request: ChatRequest, tools: Sequence[Tool], loaded: LoadedModel, templates: Templates, template: str | None,
    must_fit: bool,
) -> ChatPrompt:  # fmt: skip
    messages = as_template_messages(request.messages, tools, template)
    if template is None:
        text = plain_template([message["content"] for message in messages])
        if must_fit:
            check_length(text, loaded, "messages")
        return ChatPrompt(_checked(_begun(text, loaded), loaded, "messages"), text)
    variables = _variables(request, tools if knows_tools(template) else [])
    try:
        text = _rendered(loaded.tokenizer, template, messages, variables, templates)
    except Exception as error:  # a template is a program of others: it may raise whatever it likes
        said = str(error) if isinstance(error, TemplateFailed) else f"{type(error).__name__}: {error}"
        message = f"The model's chat template refuses these messages: {said}"
        raise ApiError(400, message, param="messages", code="invalid_value") from None
    if must_fit:
        check_length(text, loaded, "messages")
    # The template has put the special tokens where the model wants them.
    return ChatPrompt(_checked(encode(loaded.tokenizer, text, special=False), loaded, "messages"), text)


def _variables(request: ChatRequest, tools: Sequence[Tool]) -> dict[str, Any]:
    """What a template is given beside the messages."""
    own = request.chat_template_kwargs or {}
    if reserved := sorted(_RESERVED & own.keys()):
        param = f"chat_template_kwargs.{reserved[0]}"
        raise ApiError(400, f"{param} is not a variable that a request sets.", param=param, code="invalid_value")
    goes_on = bool(request.continue_final_message)
    prompted = not goes_on if request.add_generation_prompt is None else request.add_generation_prompt
    variables: dict[str, Any] = {"add_generation_prompt": prompted}
    if goes_on:
        variables["continue_final_message"] = True
    if tools:
        variables["tools"] = as_template_tools(tools)
    if request.reasoning_effort is not None:
        variables |= {"reasoning_effort": request.reasoning_effort}
        if request.reasoning_effort == "none":
            variables["enable_thinking"] = False
    if request.verbosity is not None:
        variables["verbosity"] = request.verbosity
    return {**variables, **own}


def _rendered(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], variables: dict[str, Any], templates: Templates
) -> str:
    if _has_code_of_its_own(tokenizer):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **variables))
    return templates.render(template, {**tokenizer.special_tokens_map, **variables}, messages)


def _has_code_of_its_own(tokenizer: Any) -> bool:
    """Whether it makes a text of a conversation by code of a library that is installed, not by a template."""
    from transformers import PreTrainedTokenizerBase

    return getattr(tokenizer.apply_chat_template, "__func__", None) is not PreTrainedTokenizerBase.apply_chat_template


def plain_template(texts: Sequence[str]) -> str:
    """For a model without a chat template, which was never taught roles: the texts of messages, one per line.

    The model continues the text. A conversation of one message is that message as it is, so asking a freshly
    trained base model through chat gives what a completion gives.
    """
    return "\n".join(texts)


def max_answer_tokens(
    prompts: Sequence[Sequence[int]], limit: tuple[str, int | None], context_length: int, param: str = "prompt"
) -> list[int]:
    """How many tokens each answer may have; raises `ApiError` 400 when a prompt and its answer do not fit."""
    limited_by, asked = limit
    return [_max_tokens(len(prompt), limited_by, asked, context_length, param) for prompt in prompts]


# Clients (litellm among others) know this error by OpenAI's words for it: "maximum context length".
def _max_tokens(num_prompt: int, param: str, asked: int | None, context_length: int, prompt: str) -> int:
    needed = num_prompt + (1 if asked is None else asked)
    if needed > context_length:
        answer = "" if asked is None else f" and {asked} for the answer ({param})"
        raise ApiError(
            400,
            f"This model's maximum context length is {context_length} tokens, but {needed} were asked for: "
            f"{num_prompt} in the prompt{answer}. Shorten the prompt or ask for fewer tokens.",
            param=param if asked is not None and num_prompt < context_length else prompt,
            code="context_length_exceeded",
        )
    return context_length - num_prompt if asked is None else asked


def _separate(prompt: str | list[Any], param: str) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if len(kinds) > 1:
        message = f"{param} mixes texts and token ids: give a text, token ids, or a list of one of them."
        raise ApiError(400, message, param=param, code="invalid_type")
    return [prompt] if kinds == {int} else list(prompt)


def _token_ids(item: str | list[int], loaded: LoadedModel, goes_on: bool) -> list[int]:
    if not isinstance(item, str):
        return item
    return _begun(item, loaded) if goes_on else encode(loaded.tokenizer, item)


def _begun(text: str, loaded: LoadedModel) -> list[int]:
    if loaded.is_encoder_decoder:  # an encoder is given a whole text, with its end
        return encode(loaded.tokenizer, text)
    return text_to_continue(text, loaded.tokenizer)


def text_to_continue(text: str, tokenizer: Any) -> list[int]:
    """A text with what the tokenizer puts before it. What it puts after it would end what shall go on."""
    tokens = encode(tokenizer, text)
    return tokens[: len(tokens) - _num_put_after(tokenizer)]


@lru_cache(maxsize=8)
def _num_put_after(tokenizer: Any) -> int:
    """How many tokens the tokenizer's post-processor appends to a text."""
    plain = encode(tokenizer, "a", special=False)
    whole = encode(tokenizer, "a")
    fits = [n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain]
    return len(whole) - len(plain) - fits[0] if fits else 0


def _checked(prompt: list[int], loaded: LoadedModel, param: str) -> list[int]:
    if not prompt:
        start = loaded.tokenizer.bos_token_id
        if start is None:
            raise ApiError(400, f"{param} has no tokens: give some text.", param=param, code="invalid_value")
        return [int(start)]
    highest, lowest = max(prompt), min(prompt)
    if lowest < 0 or highest >= loaded.num_vocabulary:
        wrong = lowest if lowest < 0 else highest
        message = f"token {wrong} is unknown to the model: token ids are 0 to {loaded.num_vocabulary - 1}."
        raise ApiError(400, message, param=param, code="invalid_value")
    return prompt
