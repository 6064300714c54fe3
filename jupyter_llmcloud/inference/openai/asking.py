"""Bodies of requests to generations of a model: checked, rendered, tokenized, and given a form for the answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from jupyter_llmcloud.inference.engines.base import TokenConstraint
from jupyter_llmcloud.inference.openai.answers import ChatAnswer, CompletionAnswer, EchoedPrompt, Told
from jupyter_llmcloud.inference.openai.chat.history import chat_template_of
from jupyter_llmcloud.inference.openai.chat.offered import Offer, Reading, reading_of
from jupyter_llmcloud.inference.openai.completion import GenerationOptions, GenerationRequest
from jupyter_llmcloud.inference.openai.prompts import chat_prompt, completion_prompts, max_answer_tokens
from jupyter_llmcloud.inference.openai.requests import (
    AnyRequest,
    check_engine,
    decode_chat,
    decode_completion,
    sampling_of,
    stop_token_ids,
    without_effect,
)
from jupyter_llmcloud.inference.openai.responses import Answer, Envelope
from jupyter_llmcloud.inference.openai.served_model import ServedModel
from jupyter_llmcloud.inference.openai.structured.grammars import Grammar, grammar_of
from jupyter_llmcloud.protocol.openai.chat import ChatRequest
from jupyter_llmcloud.protocol.openai.completions import CompletionRequest
from jupyter_llmcloud.protocol.openai.decoding import invalid, unsupported

NewAnswer = Callable[[Envelope, int, Told, Reading], Answer]


def new_envelope(answer_id: str, model: ServedModel, adapter: str = "") -> Envelope:
    """What all chunks of a new answer share; `adapter` gave it, where one did."""
    name = f"{model.served_name}:{adapter}" if adapter else model.served_name
    return Envelope(id=answer_id, created=int(time.time()), model=name)


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def ask_completion(model: ServedModel, body: bytes, max_sequences: int | None = None) -> GenerationRequest:
    """Check the body of POST /v1/completions; raises `ApiError`.

    Args:
        max_sequences: how many answers one request may ask for.
    """
    request = decode_completion(body)
    adapter = model.adapter_of(request.model)
    check_engine(request, model.cannot())
    prompts = completion_prompts(request, model.loaded, max_sequences)
    scores = bool(request.echo and request.logprobs is not None)
    if scores:
        _check_scoring(model)
    answer = CompletionAnswer(
        model.vocabulary,
        new_envelope(_new_id(CompletionAnswer.prefix), model, adapter),
        len(prompts) * request.num_choices,
        Told(request.logprobs is not None, request.include_usage, request.includes_usage_so_far),
        _echoed(request, prompts, model) if request.echo else (),
    )
    grammar = grammar_of(request.response_format, request.structured_outputs)
    constraint = _constraint(model, request, grammar)
    options = _options(model, request, adapter, constraint, score_prompt=scores)
    return _generation(model, request, prompts, answer, options, param="prompt")


def _check_scoring(model: ServedModel) -> None:
    if "score_prompt" in model.cannot():
        raise unsupported("echo", f"the engine {model.engine.name} cannot score a prompt. Leave echo or logprobs out.")
    if model.loaded.is_encoder_decoder:
        raise unsupported("echo", "the prompt of an encoder-decoder has no log probabilities. Leave logprobs out.")


def _echoed(request: CompletionRequest, prompts: list[list[int]], model: ServedModel) -> list[EchoedPrompt]:
    given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    texts = [text if isinstance(text, str) else None for text in given] if len(given) == len(prompts) else []
    echoed = [
        EchoedPrompt.of(model.vocabulary, prompt, texts[number] if texts else None)
        for number, prompt in enumerate(prompts)
    ]
    return [prompt for prompt in echoed for _ in range(request.num_choices)]


def ask_chat(model: ServedModel, body: bytes) -> GenerationRequest:
    """Check the body of POST /v1/chat/completions; raises `ApiError`."""

    def new_answer(envelope: Envelope, num_choices: int, told: Told, reading: Reading) -> Answer:
        return ChatAnswer(model.vocabulary, envelope, num_choices, told, reading.new_parser)

    return ask_messages(model, decode_chat(body), new_answer, _new_id(ChatAnswer.prefix))


def ask_messages(model: ServedModel, request: ChatRequest, new_answer: NewAnswer, answer_id: str) -> GenerationRequest:
    """A checked conversation; `new_answer` makes what words the answer to it."""
    adapter = model.adapter_of(request.model)
    check_engine(request, model.cannot())
    offer = Offer.of(request)
    prompt = chat_prompt(request, model.loaded, model.templates)
    reading = reading_of(offer, model.loaded.tokenizer, model.vocabulary, prompt.text)
    constraint = _constraint(model, request, offer.grammar, reading.reasoning_end)
    told = Told(bool(request.logprobs), request.include_usage, request.includes_usage_so_far, bool(request.functions))
    answer = new_answer(new_envelope(answer_id, model, adapter), request.num_choices, told, reading)
    options = _options(model, request, adapter, constraint)
    return _generation(model, request, [prompt.tokens], answer, options, param="messages", visible=reading.visible)


def _constraint(
    model: ServedModel, request: AnyRequest, grammar: Grammar | None, reasoning_end: str = ""
) -> Callable[[], TokenConstraint] | None:
    if grammar is None:
        return None
    if "constraint" in model.cannot():
        raise unsupported(grammar.param, f"the engine {model.engine.name} cannot enforce a format. Leave it out.")
    for name in ("ignore_eos", "min_tokens"):
        if getattr(request, name):
            raise invalid(name, f"{name} and {grammar.param} exclude each other: the format says when an answer ends.")
    return model.constraints.new(grammar.text, grammar.param, reasoning_end)


def _options(
    model: ServedModel, request: AnyRequest, adapter: str, constraint: Callable[[], TokenConstraint] | None,
    *, score_prompt: bool = False,
) -> GenerationOptions:  # fmt: skip
    return GenerationOptions(
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=stop_token_ids(request, model.loaded.num_vocabulary),
        score_prompt=score_prompt,
        adapter=adapter,
        new_constraint=constraint,
    )


def _generation(
    model: ServedModel, request: AnyRequest, prompts: list[list[int]], answer: Answer, options: GenerationOptions,
    *, param: str, **more: Any,
) -> GenerationRequest:  # fmt: skip
    limits = max_answer_tokens(prompts, request.token_limit, model.engine.context_length, param)
    if options.min_tokens > min(limits):
        raise invalid("min_tokens", f"min_tokens is {options.min_tokens}, but only {min(limits)} tokens fit.")
    return GenerationRequest(
        answer=answer,
        prompts=prompts,
        max_tokens=limits,
        num_choices=request.num_choices,
        sampling=sampling_of(request, model.defaults, model.loaded.num_vocabulary),
        stops=request.stops,
        stream=bool(request.stream),
        options=options,
        ignored=tuple(without_effect(request, chat_template_of(model.loaded.tokenizer, False))),
        **more,
    )
