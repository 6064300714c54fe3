"""POST /v1/responses as a generation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from jupyter_llmcloud.core.serving.endpoint.response_id import new_response_id
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.openai.answers import Told
from jupyter_llmcloud.inference.openai.asking import ask_messages
from jupyter_llmcloud.inference.openai.chat.offered import Reading
from jupyter_llmcloud.inference.openai.completion import GenerationRequest
from jupyter_llmcloud.inference.openai.prompts import check_number
from jupyter_llmcloud.inference.openai.responses import Answer, Envelope
from jupyter_llmcloud.inference.openai.responses_api.answer import ResponseAnswer
from jupyter_llmcloud.inference.openai.responses_api.conversation import (
    as_chat,
    as_items,
    input_items,
    without_effect,
)
from jupyter_llmcloud.inference.openai.responses_api.store import ResponseStore
from jupyter_llmcloud.inference.openai.served_model import ServedModel
from jupyter_llmcloud.protocol.openai.chat import ChatRequest
from jupyter_llmcloud.protocol.openai.decoding import decode
from jupyter_llmcloud.protocol.openai.responses import ResponseRequest

# How a parameter is called in a chat, and how here.
_NAMES = tuple(
    (re.compile(pattern), here)
    for pattern, here in (
        (r"\bmax_completion_tokens\b", "max_output_tokens"),
        (r"\bresponse_format\.json_schema\b", "text.format"),
        (r"\bresponse_format\b", "text.format"),
        (r"\btools\[(\d+)\]\.function\.", r"tools[\1]."),
        (r"\btool_choice\.allowed_tools\b", "tool_choice"),
        (r"\btool_choice\.function\.", "tool_choice."),
        (r"\breasoning_effort\b", "reasoning.effort"),
        (r"(?<!these )\bmessages(\[\d+\][\w.\[\]]*)?(?=$|[ :,=])", "input"),
    )
)


def ask_response(
    model: ServedModel, body: bytes, store: ResponseStore, owner: str, replica: str = ""
) -> GenerationRequest:
    """Check the body of POST /v1/responses; raises `ApiError`.

    Args:
        store: of the responses before.
        owner: whose they are.
        replica: the id of this one, which the response's own id tells.
    """
    request = decode(body, ResponseRequest)
    try:
        return _ask(model, request, store, owner, replica)
    except ApiError as error:
        raise in_words_of_responses(error) from None


def in_words_of_responses(error: ApiError) -> ApiError:
    """The same refusal by the names that parameters have here: a response is asked for as a chat."""
    message, param = error.message, error.param
    for pattern, here in _NAMES:
        message = pattern.sub(here, message)
        param = pattern.sub(here, param) if param is not None else None
    return ApiError(error.status, message, param=param, code=error.code, retry_after_s=error.retry_after_s)


Asked = TypeVar("Asked")


def asking_what_fits(chat: ChatRequest, truncation: str | None, ask: Callable[[ChatRequest], Asked]) -> Asked:
    """Ask, by `auto` without as much of what was said first as is too long for the model; raises `ApiError`.

    A conversation is cut before what a user says, so that no result is left without its call. What comes before the
    first of that, such as instructions, stays.
    """
    try:
        return ask(chat)
    except ApiError as error:
        starts = [index for index, message in enumerate(chat.messages) if message.role == "user"]
        if truncation != "auto" or error.code != "context_length_exceeded" or len(starts) < 2:
            raise
    kept = chat.messages[: starts[0]]

    def ask_from(number: int) -> Asked | None:
        """With what is said from there on; None: it is still too long."""
        try:
            return ask(msgspec.structs.replace(chat, messages=[*kept, *chat.messages[starts[number] :]]))
        except ApiError as error:
            if error.code != "context_length_exceeded" or number == len(starts) - 1:
                raise
            return None

    return _most_that_fits(len(starts) - 1, ask_from)


def _most_that_fits(last: int, ask_from: Callable[[int], Asked | None]) -> Asked:
    """Ask from the last one on, then from further and further before it: what is far too long is not read each time."""
    fits, found = last, ask_from(last)
    assert found is not None  # or it was raised why not
    too_long, step = 0, 1
    while fits - too_long > 1:
        number = (too_long + fits) // 2 if too_long else max(1, fits - step)
        if (asked := ask_from(number)) is None:
            too_long = number
        else:
            fits, found, step = number, asked, 2 * step
    return found


def _ask(
    model: ServedModel, request: ResponseRequest, store: ResponseStore, owner: str, replica: str
) -> GenerationRequest:
    earlier = store.get(request.previous_response_id, owner) if request.previous_response_id else []
    if request.truncation != "auto":  # which takes what fits of it
        check_number([*earlier, *input_items(request)], model.loaded, model.templates)
    chat = as_chat(request, earlier)

    def keep(response_id: str, output: list[dict[str, Any]], response: bytes) -> None:
        if request.store is not False:
            store.put(response_id, owner, [*earlier, *input_items(request)], as_items(output), response)

    def new_answer(envelope: Envelope, num_choices: int, told: Told, reading: Reading) -> Answer:
        parser = reading.new_parser()
        return ResponseAnswer(model.vocabulary, envelope, request, parser, keep, logprobs=told.logprobs)

    response_id = new_response_id(replica)
    asked = asking_what_fits(chat, request.truncation, lambda chat: ask_messages(model, chat, new_answer, response_id))
    of_chat = ["text.verbosity"] if "verbosity" in asked.ignored else []
    return dataclasses.replace(asked, ignored=(*without_effect(request), *of_chat))
