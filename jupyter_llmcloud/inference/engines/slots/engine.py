"""The slot engine: a thread that takes steps, and the event loop's side of it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jupyter_llmcloud.inference.engines.base import BatchingEngine, EngineError, EngineStats, Generation, TokenStream
from jupyter_llmcloud.inference.engines.kv_cache import CachePlan
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.engines.sampling import ends_of
from jupyter_llmcloud.inference.engines.slots.batch import Outcome, RunningBatch
from jupyter_llmcloud.inference.engines.slots.forward import ForwardPass
from jupyter_llmcloud.inference.engines.slots.gathering import Gathering
from jupyter_llmcloud.inference.engines.slots.kv_slots import KVSlots
from jupyter_llmcloud.inference.engines.slots.prefix_store import PrefixStore
from jupyter_llmcloud.inference.engines.slots.sequence import Sequence

log = logging.getLogger(__name__)

_IDLE_S = 5.0
_MAX_PREFIX_BYTES = 256 << 20
_STOP_S = 30.0
_ALIVE_EVERY_S = 1.0


class SlotEngine(BatchingEngine):
    """Many sequences in one forward pass, each with its keys and values in a slot of its own.

    Every step reads one token of each sequence that generates, and beside them as much of new prompts as its budget
    allows. Prompts that begin as earlier ones did start where those are known. The model itself is only called by its
    public forward pass, with a cache and an attention function of ours.

    Attributes:
        budget: how much memory keys and values may take.
    """

    name = "slots"
    unsupported = frozenset({"adapter"})

    def __init__(
        self, loaded: LoadedModel, budget: CachePlan, max_concurrent: int, num_threads: int | None = None
    ) -> None:
        super().__init__(budget.context_length, max_concurrent, num_threads or torch.get_num_threads())
        self.budget = budget
        self._eos = loaded.eos
        self._sequences: set[Sequence] = set()
        self._submitted: list[Sequence] = []
        self._gathering = Gathering(self._begin)
        self._inbox: queue.SimpleQueue[list[Sequence] | _Change | None] = queue.SimpleQueue()
        self._core = _Core(loaded, budget, max_concurrent)
        self._thread = threading.Thread(target=self._generate, name="slots", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> TokenStream:
        """Begin a sequence with the next step; it waits inside the engine while all slots are taken."""
        self.check_alive()
        stream = TokenStream(lambda: self._cancel(sequence))
        sequence = Sequence(
            generation,
            stream,
            asyncio.get_running_loop(),
            ends_of(generation, self._eos),
            min(generation.max_tokens, max(0, self.context_length - len(generation.prompt))),
            list(generation.prompt),
        )
        self._sequences.add(sequence)
        self._submitted.append(sequence)
        self._gathering.added(sequence.loop, is_idle=len(self._sequences) == len(self._submitted))
        return stream

    def _begin(self) -> None:
        """What was submitted at about the same time begins with the same step, and is read together."""
        submitted, self._submitted = self._submitted, []
        if submitted:
            self._inbox.put(submitted)

    async def change_weights(self, change: Callable[[], None]) -> None:
        """As `reload.TakesWeights`: sequences that go on are read again, with what they have generated so far."""
        self.check_alive()
        asked = _Change(change, asyncio.get_running_loop(), asyncio.get_running_loop().create_future())
        self._inbox.put(asked)
        while not asked.done.done():
            await asyncio.wait([asked.done], timeout=_ALIVE_EVERY_S)
            if not asked.done.done() and not self._thread.is_alive():
                raise EngineError(self.failure or "the generation thread has ended")
        asked.done.result()

    def stats(self) -> EngineStats:
        """The gauges now."""
        slots, prefixes, batch = self._core.slots, self._core.prefixes, self._core.batch
        return EngineStats(
            num_active=len(self._sequences),
            num_tokens=batch.num_tokens,
            num_cache_tokens=slots.num_tokens + prefixes.num_tokens,
            max_cache_tokens=self.budget.num_tokens,
            cache_bytes=slots.num_bytes + prefixes.num_bytes,
            max_cache_bytes=slots.budget,
            prefix_bytes=prefixes.num_bytes,
        )

    async def close(self) -> None:
        """End the thread after the step that it is in; sequences that go on fail, and the memory is given back."""
        self.failure = self.failure or "the engine was closed"
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, _STOP_S)
        self._fail_sequences(self.failure)
        self._core.clear()

    def _cancel(self, sequence: Sequence) -> None:
        sequence.cancelled = True
        self._sequences.discard(sequence)

    # --- the event loop is told ---

    def _deliver(self, outcomes: list[Outcome]) -> None:
        for sequence, tokens, logprobs, reason, error in outcomes:
            if error is not None:
                sequence.stream.fail(error)
            else:
                sequence.stream.push(tokens, logprobs, reason)
            if sequence.stream.ended:
                self._sequences.discard(sequence)

    def _break(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            self._fail_sequences(reason)
            self.on_failure()

    def _fail_sequences(self, reason: str) -> None:
        for sequence in list(self._sequences):
            sequence.stream.fail(EngineError(reason))
        self._sequences.clear()

    # --- the thread ---

    @torch.inference_mode()
    def _generate(self) -> None:
        batch = self._core.batch
        loop: asyncio.AbstractEventLoop | None = None
        try:
            while True:
                arrived = self._arrived(wait=batch.is_idle)
                if None in arrived:
                    return
                for item in arrived:
                    if isinstance(item, _Change):
                        loop = item.loop
                        item.carry_out(self._core)
                    elif item is not None:
                        loop = item[0].loop
                        batch.waiting.extend(item)
                if torch.get_num_threads() != self.num_threads:
                    torch.set_num_threads(self.num_threads)
                if (outcomes := batch.step()) and loop is not None:
                    self._tell(outcomes)
        except Exception as error:  # of any architecture's code
            log.exception("a step failed")
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._break, f"generation failed: {type(error).__name__}: {error}")

    def _tell(self, outcomes: list[Outcome]) -> None:
        """Each sequence in the event loop of whoever asked; where that has closed, nobody is left to be told."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Outcome]] = {}
        for outcome in outcomes:
            by_loop.setdefault(outcome[0].loop, []).append(outcome)
        for loop, part in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._deliver, part)
            except RuntimeError:
                if not loop.is_closed():
                    raise

    def _arrived(self, *, wait: bool) -> list[list[Sequence] | _Change | None]:
        """What was submitted since the last step; None ends the thread."""
        arrived: list[list[Sequence] | _Change | None] = []
        slots = self._core.slots
        while True:
            try:
                arrived.append(self._inbox.get(wait and not arrived, _IDLE_S))
            except queue.Empty:
                if arrived or not wait:
                    return arrived
                slots.trim()


@dataclass(frozen=True, eq=False)
class _Change:
    """Something to do between two steps, after which nothing that was computed counts any more."""

    change: Callable[[], None]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]

    def carry_out(self, core: _Core) -> None:
        """Called in the generation thread. What fails there is told, and raised: some weights may be others by then."""
        core.batch.start_over()
        core.prefixes.clear()
        try:
            self.change()
            core.renew()
        except Exception as error:
            self.loop.call_soon_threadsafe(self._tell, error)
            raise
        self.loop.call_soon_threadsafe(self._tell, None)

    def _tell(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class _Core:
    """What the thread works with."""

    def __init__(self, loaded: LoadedModel, budget: CachePlan, max_concurrent: int) -> None:
        self._loaded = loaded
        forward = ForwardPass(loaded)
        shapes = [layer.shape for layer in forward.layers]
        model = loaded.model
        self.slots = KVSlots(shapes, budget.context_length, budget.num_bytes, model.dtype, model.device)
        self.prefixes = PrefixStore(self.slots, min(_MAX_PREFIX_BYTES, budget.num_bytes // 2))
        self.batch = RunningBatch(forward, self.slots, self.prefixes, max_concurrent, budget.max_batch_tokens)

    def renew(self) -> None:
        """The weights have changed: what was made of them, such as packed copies, is made anew."""
        self.batch.use(ForwardPass(self._loaded))

    def clear(self) -> None:
        """Give the memory back."""
        self.batch.running.clear()
        self.batch.waiting.clear()
        self.prefixes.clear()
        self.slots.groups.clear()
