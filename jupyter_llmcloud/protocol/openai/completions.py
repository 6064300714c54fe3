"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from jupyter_llmcloud.protocol.openai.fields import MAX_LOGPROBS, GenerationFields, ResponseFormat

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        str | list[str | int | list[int]], Meta(description="A text, texts, token ids, or lists of token ids.")
    ]
    max_completion_tokens: (
        Annotated[int, Meta(ge=0, description="As max_tokens: what some clients send beside it.")] | None
    ) = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    best_of: Annotated[Any, Meta(description="Only 1.")] = None
    suffix: Annotated[Any, Meta(description="Not supported.")] = None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The parameter that limits the answer, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report for each token; None reports nothing."""
        return self.logprobs
