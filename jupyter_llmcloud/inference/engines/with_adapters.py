"""Adapters of PEFT beside the model that they belong to: each has an engine, and all of them share its weights.

The modules of the model are copied, its tensors are not; the adapter's own layers are put into the copy. So the model's
answers stay what they are, requests of one adapter are batched together, and an adapter costs its own weights and the
keys and values of its sequences. Every such engine is tried like any other before it is believed.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import importlib.util
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.errors import LLMCloudError, ModelError
from jupyter_llmcloud.inference.engines.adapters import attached
from jupyter_llmcloud.inference.engines.base import Engine, EngineError, EngineStats, Generation, TokenStream
from jupyter_llmcloud.inference.engines.kv_cache import share_of_free
from jupyter_llmcloud.inference.engines.loading import LoadedModel, loading
from jupyter_llmcloud.inference.engines.reload import TakesWeights
from jupyter_llmcloud.inference.engines.soundness import check_finite
from jupyter_llmcloud.storage.model_folder import check_folder

if TYPE_CHECKING:
    from jupyter_llmcloud.inference.openai.completion import ServedModel

_DRAIN_EVERY_S = 0.05
Open = Callable[[LoadedModel, int, int | None], Awaitable[Engine]]


class EngineWithAdapters:
    """The engine of a model and those of its adapters, as one engine: `Generation.adapter` says which one answers.

    Attributes:
        refused: adapters of the endpoint that are not answered for, and why.
    """

    def __init__(self, loaded: LoadedModel, base: Engine, open_engine: Open) -> None:
        self._loaded = loaded
        self._base = base
        self._open = open_engine
        self._adapted: dict[str, Engine] = {}
        self._leaving: dict[Engine, asyncio.Task[None]] = {}
        self.refused: dict[str, str] = {}
        self.name = base.name
        self.context_length = base.context_length
        self.num_parallel = base.num_parallel
        self.unsupported: frozenset[str] = getattr(base, "unsupported", frozenset()) - {"adapter"}
        self.on_failure: Callable[[], None] = base.on_failure

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return list(self._adapted)

    @property
    def failure(self) -> str | None:
        """Of the model's own engine, or of an adapter's."""
        return next((one.failure for one in [self._base, *self._adapted.values()] if one.failure), None)

    @failure.setter
    def failure(self, reason: str | None) -> None:
        self._base.failure = reason

    @property
    def num_threads(self) -> int:
        """Of each engine."""
        return self._base.num_threads

    @num_threads.setter
    def num_threads(self, number: int) -> None:
        for engine in [self._base, *self._adapted.values(), *self._leaving]:
            engine.num_threads = number

    def submit(self, generation: Generation) -> TokenStream:
        """Begin a sequence with the adapter that it names."""
        if not generation.adapter:
            return self._base.submit(generation)
        if (engine := self._adapted.get(generation.adapter)) is None:
            raise EngineError(f"the adapter {generation.adapter!r} is not loaded any more")
        return engine.submit(dataclasses.replace(generation, adapter=""))

    def stats(self) -> EngineStats:
        """All of them together."""
        engines = [self._base, *self._adapted.values(), *self._leaving]
        rows = [dataclasses.astuple(engine.stats()) for engine in engines]
        return EngineStats(*map(sum, zip(*rows, strict=True)))

    async def load(self, name: str, folder: str) -> None:
        """Answer for an adapter; raises ModelError when it does not fit. One of that name is replaced."""
        try:
            adapted = await asyncio.to_thread(self._attach, folder)
            adapted = dataclasses.replace(adapted, cache_bytes=self._unpromised())
            engine = await self._open(adapted, self.num_parallel, self.num_threads)
        except LLMCloudError as error:
            if name not in self._adapted:
                self.refused[name] = str(error)
            raise
        engine.on_failure = self.on_failure
        self.refused.pop(name, None)
        before, self._adapted[name] = self._adapted.get(name), engine
        if before is not None:
            self._let_go(before)

    def _unpromised(self) -> int:
        """How much another engine may take for keys and values: those that are there may still grow."""
        stats = self.stats()
        room = share_of_free(self._loaded.model.device, stats.max_cache_bytes - stats.cache_bytes)
        return room if self._loaded.cache_bytes is None else min(room, self._loaded.cache_bytes)

    def _attach(self, folder: str) -> LoadedModel:
        if importlib.util.find_spec("peft") is None:
            raise ModelError(
                f"{folder} holds an adapter, and peft is not installed: pip install 'jupyter-llmcloud[peft]'."
            )
        model = self._loaded.model
        layout = check_folder(Path(folder), Path(model.name_or_path or "."))
        if layout.adapter is None:
            raise ModelError(f"{folder} is a whole model, not an adapter: serve it under a name of its own.")
        tensors = itertools.chain(model.parameters(), model.buffers())
        clone = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        with loading(layout.adapter):
            adapted = attached(clone, layout.adapter)
        check_finite(layout.adapter, adapted)
        return dataclasses.replace(self._loaded, model=adapted)

    async def unload(self, name: str) -> None:
        """Answer for an adapter no longer, but for what it answers already. One that is not there is fine."""
        self.refused.pop(name, None)
        if (engine := self._adapted.pop(name, None)) is not None:
            self._let_go(engine)

    def _let_go(self, engine: Engine) -> None:
        """Close an engine once the last of its sequences has ended."""
        engine.on_failure = _nobody_minds
        self._leaving[engine] = asyncio.get_running_loop().create_task(self._drained(engine))

    async def _drained(self, engine: Engine) -> None:
        try:
            while engine.stats().num_active and engine.failure is None:
                await asyncio.sleep(_DRAIN_EVERY_S)
        finally:
            await engine.close()
            del self._leaving[engine]

    async def change_weights(self, change: Callable[[], None]) -> None:
        """The weights that all of them share change: each stops between two steps of its own for that."""
        engines: list[Any] = [self._base, *self._adapted.values()]
        if not all(isinstance(engine, TakesWeights) for engine in engines):
            raise ModelError(f"the {self.name} engine takes no other weights while it is open.")
        if not self._adapted and not self._leaving:
            await engines[0].change_weights(change)
            return
        raise ModelError("adapters are loaded beside it, which belong to the weights that are served now.")

    async def close(self) -> None:
        """End all of them."""
        leaving = list(self._leaving.values())
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        # A task that was ended before it began has closed nothing.
        await asyncio.gather(*(engine.close() for engine in [*self._leaving, *self._adapted.values(), self._base]))


def _nobody_minds() -> None:
    """An engine that leaves has failed: those that stay answer as before."""


def adapters_of(served: ServedModel) -> EngineWithAdapters:
    """The engine of a served model, as one that can have adapters."""
    if not isinstance(served.engine, EngineWithAdapters):
        from jupyter_llmcloud.inference.engines.select import open_engine

        served.engine = EngineWithAdapters(served.loaded, served.engine, open_engine)
    return served.engine
