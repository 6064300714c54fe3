"""Prompts to token ids, and whether they fit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.requests import ChatMessage, ChatRequest, CompletionRequest
from jupyter_llmcloud.inference.openai.templates import TemplateFailed, Templates


def completion_prompts(request: CompletionRequest, loaded: LoadedModel) -> list[list[int]]:
    """The token ids of every prompt of the request: a text, texts, token ids, or lists of them."""
    prompts = [_token_ids(item, loaded) for item in _separate(request.prompt)]
    if not prompts:
        raise ApiError(400, "prompt is an empty list.", param="prompt", code="invalid_value")
    return [_checked(prompt, loaded, "prompt") for prompt in prompts]


def chat_prompt(request: ChatRequest, loaded: LoadedModel, templates: Templates | None = None) -> list[int]:
    """The token ids of a conversation, through the model's chat template or else through `plain_template`.

    Args:
        templates: what renders; without it, a process is started for this conversation alone.
    """
    if not getattr(loaded.tokenizer, "chat_template", None):
        return _checked(_text_to_continue(plain_template(request.messages), loaded), loaded, "messages")
    messages = [_as_dict(message) for message in request.messages]
    with nullcontext(templates) if templates is not None else closing(Templates()) as renderer:
        try:
            text = _rendered(loaded.tokenizer, messages, renderer)
        except Exception as error:  # a template is a program of others: it may raise whatever it likes
            said = str(error) if isinstance(error, TemplateFailed) else f"{type(error).__name__}: {error}"
            message = f"The model's chat template refuses these messages: {said}"
            raise ApiError(400, message, param="messages", code="invalid_value") from None
    # The template has put the special tokens where the model wants them.
    return _checked(_encode(loaded.tokenizer, text, special=False), loaded, "messages")


def _rendered(tokenizer: Any, messages: list[dict[str, str]], templates: Templates) -> str:
    from transformers import PreTrainedTokenizerBase

    if getattr(tokenizer.apply_chat_template, "__func__", None) is not PreTrainedTokenizerBase.apply_chat_template:
        # Code of a library that is installed, not a template.
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return templates.render(tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map), messages)


def plain_template(messages: Sequence[ChatMessage]) -> str:
    """For a model without a chat template, which was never taught roles: the texts of messages, one per line.

    The model continues the text. A conversation of one message is that message as it is, so asking a freshly
    trained base model through chat gives what a completion gives.
    """
    return "\n".join(message.text for message in messages)


def max_answer_tokens(
    prompts: Sequence[Sequence[int]], limit: tuple[str, int | None], context_length: int
) -> list[int]:
    """How many tokens each answer may have; raises `ApiError` 400 when a prompt and its answer do not fit."""
    param, asked = limit
    return [_max_tokens(len(prompt), param, asked, context_length) for prompt in prompts]


def _max_tokens(num_prompt: int, param: str, asked: int | None, context_length: int) -> int:
    needed = num_prompt + (1 if asked is None else asked)
    if needed > context_length:
        answer = "" if asked is None else f" and {asked} for the answer ({param})"
        raise ApiError(
            400,
            f"This model's context length is {context_length} tokens, but {needed} were asked for: "
            f"{num_prompt} in the prompt{answer}. Shorten the prompt or ask for fewer tokens.",
            param=param if asked is not None and num_prompt < context_length else "prompt",
            code="context_length_exceeded",
        )
    return context_length - num_prompt if asked is None else asked


def _separate(prompt: str | list[Any]) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        message = "prompt mixes texts and token ids: give a text, token ids, or a list of one of them."
        raise ApiError(400, message, param="prompt", code="invalid_type")
    return [prompt] if kinds == {int} else list(prompt)


def _token_ids(item: str | list[int], loaded: LoadedModel) -> list[int]:
    return _text_to_continue(item, loaded) if isinstance(item, str) else item


def _text_to_continue(text: str, loaded: LoadedModel) -> list[int]:
    """A text with what the tokenizer puts before it. What it puts after it would end what shall go on."""
    tokens = _encode(loaded.tokenizer, text)
    if loaded.is_encoder_decoder:  # an encoder is given a whole text, with its end
        return tokens
    return tokens[: len(tokens) - _num_put_after(loaded.tokenizer)]


def _num_put_after(tokenizer: Any) -> int:
    """How many tokens the tokenizer's post-processor appends to a text."""
    plain = _encode(tokenizer, "a", special=False)
    whole = _encode(tokenizer, "a")
    fits = [n for n in range(len(whole) - len(plain) + 1) if whole[n : n + len(plain)] == plain]
    return len(whole) - len(plain) - fits[0] if fits else 0


def _encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    # The length is judged afterwards, by a 400: the tokenizer's own warning would fill the log.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


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


def _as_dict(message: ChatMessage) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    named = {"name": message.name} if message.name else {}
    return {"role": role, "content": message.text, **named}
