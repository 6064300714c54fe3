"""POST /v1/embeddings, /v1/tokenize and /v1/detokenize: what needs a model's tokenizer, and no generation."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.openai.prompts import chat_prompt, token_ids_of
from jupyter_llmcloud.inference.openai.served_model import ServedModel
from jupyter_llmcloud.protocol.openai.chat import ChatRequest
from jupyter_llmcloud.protocol.openai.decoding import decode, invalid
from jupyter_llmcloud.protocol.openai.embeddings import (
    MAX_INPUTS,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

if TYPE_CHECKING:
    from jupyter_llmcloud.inference.openai.embedding.encoders import ServedEncoder


def embedding_prompts(model: ServedModel | ServedEncoder, body: bytes) -> tuple[EmbeddingRequest, list[list[int]]]:
    """Check the body of POST /v1/embeddings; raises `ApiError`."""
    request = decode(body, EmbeddingRequest)
    model.adapter_of(request.model)
    prompts = token_ids_of(request.input, model.loaded, "input", MAX_INPUTS)
    longest = max(len(prompt) for prompt in prompts)
    if longest > model.loaded.context_length:
        message = (
            f"This model's maximum context length is {model.loaded.context_length} tokens, but a text has {longest}."
        )
        raise ApiError(400, message, param="input", code="context_length_exceeded")
    size = model.loaded.model.config.get_text_config().hidden_size
    if request.dimensions is not None and request.dimensions > size:
        raise invalid("dimensions", f"dimensions is {request.dimensions}: this model's embeddings have {size}.")
    return request, prompts


async def embed(
    model: ServedModel | ServedEncoder, request: EmbeddingRequest, prompts: list[list[int]]
) -> dict[str, Any]:
    """The reply."""
    vectors = await model.embedder.embed(prompts)
    # A million numbers take a while to be written: streams of others go on meanwhile.
    data = await asyncio.to_thread(_rows, vectors, request)
    num_tokens = sum(len(prompt) for prompt in prompts)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model.served_name, "usage": usage}


def _rows(vectors: Sequence[Any], request: EmbeddingRequest) -> list[msgspec.Raw]:
    """A row for each vector, as JSON. One at a time: nothing else in the process runs while one is written."""
    encoder = msgspec.json.Encoder()
    return [
        msgspec.Raw(encoder.encode({"object": "embedding", "index": index, "embedding": _told(vector, request)}))
        for index, vector in enumerate(vectors)
    ]


def _told(vector: Any, request: EmbeddingRequest) -> Any:
    if request.dimensions is not None:
        vector = vector[: request.dimensions]
        vector = vector / max(float(numpy.linalg.norm(vector)), 1e-12)
    if request.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def tokenize(model: ServedModel | ServedEncoder, body: bytes) -> dict[str, Any]:
    """The tokens of a prompt or of a conversation."""
    request = decode(body, TokenizeRequest)
    model.adapter_of(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt", "give either prompt or messages.")
    if request.messages is not None:
        chat = ChatRequest(
            model=request.model, messages=request.messages, tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message, chat_template_kwargs=request.chat_template_kwargs,
        )  # fmt: skip
        if not request.messages:
            raise invalid("messages", "messages is empty: give at least one message.")
        tokens = chat_prompt(chat, model.loaded, model.templates, must_fit=False).tokens
    else:
        special = request.add_special_tokens is not False
        tokens = list(model.loaded.tokenizer(request.prompt, add_special_tokens=special, verbose=False)["input_ids"])
    told: dict[str, Any] = {"count": len(tokens), "max_model_len": model.context_length, "tokens": tokens}
    told["token_strs"] = [model.vocabulary.name(token) for token in tokens] if request.return_token_strs else None
    return told


def detokenize(model: ServedModel | ServedEncoder, body: bytes) -> dict[str, Any]:
    """The text of tokens."""
    request = decode(body, DetokenizeRequest)
    model.adapter_of(request.model)
    if wrong := [token for token in request.tokens if token >= model.loaded.num_vocabulary]:
        limit = model.loaded.num_vocabulary - 1
        raise invalid("tokens", f"token {wrong[0]} is unknown to the model: token ids are 0 to {limit}.")
    return {"prompt": str(model.loaded.tokenizer.decode(request.tokens))}
