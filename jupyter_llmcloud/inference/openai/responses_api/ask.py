"""POST /v1/responses as a generation."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.core.serving.endpoint.response_id import new_response_id
from jupyter_llmcloud.inference.openai.answers import Told
from jupyter_llmcloud.inference.openai.asking import ask_messages
from jupyter_llmcloud.inference.openai.chat.offered import Reading
from jupyter_llmcloud.inference.openai.completion import GenerationRequest
from jupyter_llmcloud.inference.openai.decoding import decode
from jupyter_llmcloud.inference.openai.responses import Answer, Envelope
from jupyter_llmcloud.inference.openai.responses_api.answer import ResponseAnswer
from jupyter_llmcloud.inference.openai.responses_api.conversation import as_chat, as_items, input_items
from jupyter_llmcloud.inference.openai.responses_api.store import ResponseStore
from jupyter_llmcloud.inference.openai.served_model import ServedModel
from jupyter_llmcloud.protocol.openai.responses import ResponseRequest


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
    earlier = store.get(request.previous_response_id, owner) if request.previous_response_id else []
    chat = as_chat(request, earlier)

    def keep(response_id: str, output: list[dict[str, Any]]) -> None:
        if request.store is not False:
            store.put(response_id, owner, [*earlier, *input_items(request), *as_items(output)])

    def new_answer(envelope: Envelope, num_choices: int, told: Told, reading: Reading) -> Answer:
        parser = reading.new_parser()
        return ResponseAnswer(model.vocabulary, envelope, request, parser, keep, logprobs=told.logprobs)

    return ask_messages(model, chat, new_answer, new_response_id(replica))
