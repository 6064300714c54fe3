"""One request of a client: prompts and parameters in, choices out, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.base import Engine, Generation, Sampling, TokenBatch, TokenStream
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.detokenize import Piece, Transcript
from jupyter_llmcloud.inference.openai.prompts import chat_prompt, completion_prompts, max_answer_tokens
from jupyter_llmcloud.inference.openai.requests import (
    ChatRequest,
    CompletionRequest,
    decode_chat,
    decode_completion,
    sampling_of,
)
from jupyter_llmcloud.inference.openai.responses import (
    DONE,
    ChatFormat,
    Choice,
    CompletionFormat,
    Envelope,
    Format,
    TokenUsage,
    event,
)
from jupyter_llmcloud.inference.openai.templates import Templates
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request, with its prompts as tokens.

    Attributes:
        format: how the route words its answers.
        prompts: token ids of each prompt.
        max_tokens: how many tokens each prompt's answers may have.
        num_choices: how many answers to each prompt.
        sampling: how tokens are chosen.
        stops: strings that end an answer.
        stream, include_usage: how the client wants it.
        adapter: the adapter that answers; "": the model itself.
    """

    format: Format
    prompts: list[list[int]]
    max_tokens: list[int]
    num_choices: int
    sampling: Sampling
    stops: list[str]
    stream: bool
    include_usage: bool
    adapter: str = ""

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine gets."""
        return len(self.prompts) * self.num_choices

    def generations(self) -> list[Generation]:
        """What the engine gets, in the order of the choices; with a seed, each choice has one of its own."""
        incremental = self.stream or bool(self.stops)
        return [
            Generation(prompt, room, _reseeded(self.sampling, number), incremental, adapter=self.adapter)
            for prompt, room in zip(self.prompts, self.max_tokens, strict=True)
            for number in range(self.num_choices)
        ]


def _reseeded(sampling: Sampling, number: int) -> Sampling:
    if sampling.seed is None or number == 0:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + number)


class ServedModel:
    """A served model: turns bodies into asks, and asks into answers.

    Attributes:
        loaded: the model and its tokenizer.
        engine: what generates.
        served_name: the name that requests must use.
        vocabulary: what its tokens add to a text.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engine: Engine,
        served_name: str,
        defaults: dict[str, float] | None = None,
        templates: Templates | None = None,
    ) -> None:
        self.loaded = loaded
        self.engine = engine
        self.served_name = served_name
        self.vocabulary = Vocabulary(loaded.tokenizer)
        self._defaults = defaults or {}
        self._templates = templates
        self._completion_format = CompletionFormat(self.vocabulary)
        self._chat_format = ChatFormat(self.vocabulary)

    def completion(self, body: bytes) -> GenerationRequest:
        """Check the body of POST /v1/completions; raises `ApiError`."""
        request = decode_completion(body)
        self._check_name(request.model)
        return self._ask(request, completion_prompts(request, self.loaded), self._completion_format)

    def chat(self, body: bytes) -> GenerationRequest:
        """Check the body of POST /v1/chat/completions; raises `ApiError`."""
        request = decode_chat(body)
        self._check_name(request.model)
        return self._ask(request, [chat_prompt(request, self.loaded, self._templates)], self._chat_format)

    def _ask(
        self, request: CompletionRequest | ChatRequest, prompts: list[list[int]], form: Format
    ) -> GenerationRequest:
        return GenerationRequest(
            format=form,
            prompts=prompts,
            max_tokens=max_answer_tokens(prompts, request.token_limit, self.engine.context_length),
            num_choices=request.num_choices,
            sampling=sampling_of(request, self._defaults, self.loaded.num_vocabulary),
            stops=request.stops,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            adapter=self._adapter_of(request.model),
        )

    async def close(self) -> None:
        """End what generates, and what renders."""
        await self.engine.close()
        if self._templates is not None:
            await asyncio.to_thread(self._templates.close)

    def _adapter_of(self, name: str) -> str:
        """The adapter that a model's name stands for: `NAME:ADAPTER`, or the adapter's own name."""
        return "" if name == self.served_name else name.removeprefix(f"{self.served_name}:")

    def _check_name(self, name: str) -> None:
        adapters = getattr(self.engine, "names", ())
        if name != self.served_name and self._adapter_of(name) not in adapters:
            message = f"The model {name!r} does not exist here: this endpoint serves {self.served_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")


class Completion:
    """The sequences of an ask while they are generated. Close it whatever happened: that frees the engine."""

    def __init__(self, model: ServedModel, ask: GenerationRequest) -> None:
        self._ask = ask
        self._model = model
        self.usage = TokenUsage(num_prompt=sum(len(prompt) for prompt in ask.prompts))
        self._envelope = Envelope(
            id=f"{ask.format.prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=model.served_name
        )
        self._choices = [Choice(index) for index in range(ask.num_sequences)]
        self._streams: list[TokenStream] = []
        self._transcripts: list[Transcript] = []
        try:
            for generation in ask.generations():
                self._begin(generation)
        except BaseException:
            self.close()
            raise

    def _begin(self, generation: Generation) -> None:
        self._streams.append(self._model.engine.submit(generation))
        prompt = () if self._model.loaded.is_encoder_decoder else generation.prompt
        self._transcripts.append(Transcript(self._model.vocabulary, prompt, self._ask.stops))

    def close(self) -> None:
        """Stop what still goes on."""
        for stream in self._streams:
            stream.close()

    async def whole(self) -> dict[str, Any]:
        """The whole reply, once every choice has ended."""
        async with aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        choices = [self._ask.format.choice(choice, self._wanted(choice.logprobs)) for choice in self._choices]
        return self._ask.format.reply(self._envelope, choices, self.usage)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream, [DONE] included."""
        openings = [self._ask.format.opening(choice.index) for choice in self._choices]
        if ready := b"".join(self._chunk([opening]) for opening in openings if opening is not None):
            yield ready
        async with aclosing(self._pieces()) as pieces:
            async for choice, piece in pieces:
                if chunks := self._chunks(choice, piece):
                    yield chunks
        yield self._usage_chunk() + DONE

    def _chunks(self, choice: Choice, piece: Piece) -> bytes:
        """New text in a chunk, and the end of a choice in a chunk of its own."""
        reason, choice.finish_reason = choice.finish_reason, None
        chunks = b""
        if piece.text or (piece.logprobs and self._ask.sampling.num_logprobs is not None):
            entry = self._ask.format.piece(choice, piece.text, self._wanted(piece.logprobs))
            chunks = self._chunk([entry])
        choice.finish_reason = reason
        if reason is not None:
            chunks += self._chunk([self._ask.format.piece(choice, "", None)])
        return chunks

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        body = self._ask.format.chunk(self._envelope, choices)
        if self._ask.include_usage:
            body["usage"] = None
        return event(body)

    def _usage_chunk(self) -> bytes:
        if not self._ask.include_usage:
            return b""
        return event({**self._ask.format.chunk(self._envelope, []), "usage": self.usage.body()})

    def _wanted(self, logprobs: list[Any]) -> list[Any] | None:
        return None if self._ask.sampling.num_logprobs is None else logprobs

    async def _pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        async with aclosing(merged(self._streams)) as batches:
            async for index, batch in batches:
                choice = self._choices[index]
                if choice.finish_reason is not None:
                    continue
                piece = self._transcripts[index].feed(batch)
                self._note(choice, piece)
                if piece.finish_reason is not None:
                    self._streams[index].close()
                yield choice, piece

    def _note(self, choice: Choice, piece: Piece) -> None:
        choice.text += piece.text
        choice.logprobs += piece.logprobs
        choice.finish_reason = piece.finish_reason
        self.usage.num_generated += piece.num_tokens


async def merged(streams: Sequence[TokenStream]) -> AsyncGenerator[tuple[int, TokenBatch], None]:
    """The batches of all streams as they come, with their stream's index; the first failure is raised."""
    if len(streams) == 1:
        async for batch in streams[0]:
            yield 0, batch
        return
    arrived: asyncio.Queue[tuple[int, TokenBatch | BaseException | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(index, stream, arrived)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, stream: TokenStream, arrived: asyncio.Queue[tuple[int, TokenBatch | BaseException | None]]
) -> None:
    try:
        async for batch in stream:
            arrived.put_nowait((index, batch))
        arrived.put_nowait((index, None))
    except Exception as error:
        arrived.put_nowait((index, error))
