"""One request of a client: prompts and parameters in, choices out, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.engines.base import (
    Generation,
    Sampling,
    TokenBatch,
    TokenConstraint,
    TokenStream,
)
from jupyter_llmcloud.inference.openai.detokenize import TextPiece, Transcript
from jupyter_llmcloud.inference.openai.responses import Answer, TokenUsage
from jupyter_llmcloud.inference.openai.served_model import ServedModel

__all__ = ["Completion", "GenerationOptions", "GenerationRequest", "ServedModel", "merged"]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What an engine is asked beside sampling, the same for every sequence of a request.

    Attributes:
        new_constraint: makes what the tokens of each sequence must follow.
        others: as the fields of `Generation`.
    """

    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    score_prompt: bool = False
    adapter: str = ""
    new_constraint: Callable[[], TokenConstraint] | None = None

    def asked(self) -> dict[str, Any]:
        """The fields of a `Generation`, with a constraint of its own."""
        named = ("min_tokens", "ignore_eos", "stop_token_ids", "score_prompt", "adapter")
        constraint = self.new_constraint() if self.new_constraint is not None else None
        return {**{name: getattr(self, name) for name in named}, "constraint": constraint}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request, with its prompts as tokens.

    Attributes:
        answer: words what is generated, as the route does.
        prompts: token ids of each prompt.
        max_tokens: how many tokens each prompt's answers may have.
        num_choices: how many answers to each prompt.
        sampling: how tokens are chosen.
        stops: strings that end an answer.
        stream: how the client wants it.
        visible: special tokens that a text must show, for whoever reads it.
        ignored: parameters that were sent and change nothing.
    """

    answer: Answer
    prompts: list[list[int]]
    max_tokens: list[int]
    num_choices: int
    sampling: Sampling
    stops: list[str]
    stream: bool
    options: GenerationOptions = field(default_factory=GenerationOptions)
    visible: frozenset[int] = frozenset()
    ignored: tuple[str, ...] = ()

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine gets."""
        return len(self.prompts) * self.num_choices

    def generations(self) -> list[Generation]:
        """What the engine gets, in the order of the choices; with a seed, each choice has one of its own."""
        incremental = self.stream or bool(self.stops)
        return [
            Generation(prompt, room, _reseeded(self.sampling, number), incremental, **self.options.asked())
            for prompt, room in zip(self.prompts, self.max_tokens, strict=True)
            for number in range(self.num_choices)
        ]

    def transcript(self, generation: Generation, model: ServedModel) -> Transcript:
        """What turns the tokens of a sequence into text."""
        prompt = () if model.loaded.is_encoder_decoder else generation.prompt
        scores = generation.score_prompt
        num_scored = len(generation.prompt) - 1 if scores else 0
        return Transcript(
            model.vocabulary, prompt, self.stops, self.visible,
            num_scored=num_scored, places_end=scores, min_tokens=generation.min_tokens,
        )  # fmt: skip


def _reseeded(sampling: Sampling, number: int) -> Sampling:
    if sampling.seed is None or number == 0:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + number)


class Completion:
    """The sequences of an ask while they are generated. Close it whatever happened: that frees the engine."""

    def __init__(self, model: ServedModel, ask: GenerationRequest) -> None:
        self._answer = ask.answer
        self._num_choices = ask.num_choices
        self.usage = TokenUsage(num_prompt=sum(len(prompt) for prompt in ask.prompts))
        self._ended = [False] * ask.num_sequences
        self._streams: list[TokenStream] = []
        self._transcripts: list[Transcript] = []
        self._constraints: list[TokenConstraint | None] = []
        try:
            for generation in ask.generations():
                self._streams.append(model.engine.submit(generation))
                self._transcripts.append(ask.transcript(generation, model))
                self._constraints.append(generation.constraint)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop what still goes on."""
        for stream in self._streams:
            stream.close()

    async def whole(self) -> dict[str, Any]:
        """The whole reply, once every choice has ended."""
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                self._answer.piece(index, piece, self.usage)
        return self._answer.whole(self.usage)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream, [DONE] included."""
        if opening := self._answer.opening(self.usage):
            yield opening
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                if chunks := self._answer.piece(index, piece, self.usage):
                    yield chunks
        yield self._answer.closing(self.usage)

    async def _pieces(self) -> AsyncGenerator[tuple[int, TextPiece], None]:
        async with aclosing(merged(self._streams)) as batches:
            async for index, batch in batches:
                if self._ended[index]:
                    continue
                piece = self._transcripts[index].feed(batch)
                self.usage.num_generated += piece.num_tokens
                if piece.finish_reason is not None:
                    self._ended[index] = True
                    self._streams[index].close()
                    self._check_grammar(index)
                    self._note_reused()
                yield index, piece

    def _note_reused(self) -> None:
        """A prompt counts once, however many choices there are of it: as often as it was read for the first of them."""
        first = [stream.num_reused for stream in self._streams[:: self._num_choices]]
        self.usage.num_reused = None if None in first else sum(one or 0 for one in first)

    def _check_grammar(self, index: int) -> None:
        if error := getattr(self._constraints[index], "error", ""):
            # What the client has sent is at fault: to ask again would come to the same.
            raise ApiError(400, f"The grammar could not be followed to its end: {error}", code="invalid_grammar")


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
