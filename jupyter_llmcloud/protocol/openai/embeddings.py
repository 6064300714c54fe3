"""The body of POST /v1/embeddings, and of the routes that tell a tokenizer's view of a text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from jupyter_llmcloud.protocol.openai.chat import ChatMessage, Tool
from jupyter_llmcloud.protocol.openai.fields import OpenAIBody, TokenId

MAX_INPUTS = 2048


class EmbeddingRequest(OpenAIBody, kw_only=True):
    """The body of POST /v1/embeddings."""

    model: str
    input: Annotated[
        str | Annotated[list[str | int | list[int]], Meta(max_length=65536)],
        Meta(description="A text, texts, token ids, or lists of token ids; at most 2048 of them."),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: (
        Annotated[int, Meta(ge=1, description="Keep so many of the first numbers, of length 1 again.")] | None
    ) = None
    user: str | None = None


class TokenizeRequest(OpenAIBody, kw_only=True):
    """The body of POST /v1/tokenize: a prompt, or the messages of a conversation."""

    model: str
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(OpenAIBody, kw_only=True):
    """The body of POST /v1/detokenize."""

    model: str
    tokens: list[TokenId]
