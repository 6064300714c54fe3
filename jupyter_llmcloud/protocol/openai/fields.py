"""What several routes of the OpenAI surface take: fields of a generation, and formats that an answer must have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_CHOICES = 32
MAX_STOPS = 16
MAX_STOP_LENGTH = 512
MAX_LOGPROBS = 20
_INT64 = 2**63

StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


ServiceTier = Annotated[
    Literal["auto", "default", "flex", "scale", "priority"],
    Meta(description="Accepted without effect: there is one tier here, which is called default."),
]


class OpenAIBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of a body or a part of one. A field that is null counts as left out; an unknown one is refused."""


class StreamOptions(OpenAIBody, kw_only=True):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, Meta(description="Accepted without effect.")] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="With include_usage: every chunk tells the usage so far.")
    ] = None


class JsonSchemaFormat(OpenAIBody, kw_only=True):
    """A JSON schema that an answer must satisfy."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(OpenAIBody, kw_only=True):
    """The format of an answer: free text, any JSON object, JSON of a schema, or text of an expression or grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "json"]
    json_schema: JsonSchemaFormat | None = None
    pattern: Annotated[str, Meta(description="Of type regex.", max_length=65536)] | None = None
    grammar: Annotated[str, Meta(description="Of type grammar, in Lark's notation.", max_length=65536)] | None = None
    schema: Annotated[dict[str, Any], Meta(description="Of type json_object, as llama.cpp's clients do.")] | None = None
    value: (
        Annotated[dict[str, Any] | str, Meta(description="The schema or pattern, as huggingface_hub's client does.")]
        | None
    ) = None


class StructuredOutputs(OpenAIBody, kw_only=True):
    """The same in the words of vLLM's clients: one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationFields(OpenAIBody, kw_only=True):
    """What completions and chat completions both take."""

    model: Annotated[str, Meta(description="Name of an endpoint.")]
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[dict[str, Any] | str | None, Meta(description="As structured_outputs.json.")] = None
    guided_regex: Annotated[str | None, Meta(description="As structured_outputs.regex.")] = None
    guided_choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    guided_grammar: Annotated[str | None, Meta(description="As structured_outputs.grammar.")] = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Annotated[Any, Meta(description="Accepted without effect.")] = None
    store: Annotated[bool | None, Meta(description="Accepted without effect: only responses are stored.")] = None
    cache_control: Annotated[Any, Meta(description="Accepted without effect.")] = None
    add_special_tokens: Annotated[Any, Meta(description="Only true for a prompt, false for a conversation.")] = None
    skip_special_tokens: Annotated[Any, Meta(description="Only true.")] = None
    spaces_between_special_tokens: Annotated[Any, Meta(description="Only true.")] = None
    include_stop_str_in_output: Annotated[Any, Meta(description="Only false.")] = None
    use_beam_search: Annotated[Any, Meta(description="Only false.")] = None
    length_penalty: Annotated[Any, Meta(description="Only 1.")] = None
    return_tokens_as_token_ids: Annotated[Any, Meta(description="Only false.")] = None
    return_token_ids: Annotated[Any, Meta(description="Only false.")] = None
    early_stopping: Annotated[Any, Meta(description="Only false.")] = None
    detokenize: Annotated[Any, Meta(description="Only true.")] = None
    priority: Annotated[Any, Meta(description="Only 0.")] = None
    service_tier: ServiceTier | None = None

    @property
    def num_choices(self) -> int:
        """How many answers to one prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> list[str]:
        """Stop strings, as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def includes_usage_so_far(self) -> bool:
        """Whether all of its chunks tell it."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)
