"""The model that a replica serves: its weights, its tokenizer, its engine, and what requests to it become."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.base import Engine
from jupyter_llmcloud.inference.engines.loading import LoadedModel
from jupyter_llmcloud.inference.openai.chat.templates import Templates
from jupyter_llmcloud.inference.openai.structured.constraint import Constraints
from jupyter_llmcloud.inference.openai.vocabulary import Vocabulary

if TYPE_CHECKING:
    from jupyter_llmcloud.inference.openai.embedding.embedder import Embedder


class ServedModel:
    """A served model.

    Attributes:
        loaded: the model and its tokenizer.
        engine: what generates.
        served_name: the name that requests must use.
        vocabulary: what its tokens add to a text.
        constraints: what makes grammars for its answers.
        defaults: what it recommends for sampling.
        templates: what renders its chat template.
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
        self.constraints = Constraints(loaded, self.vocabulary)
        self.defaults = defaults or {}
        self.templates = templates

    async def close(self) -> None:
        """End what generates, and what renders."""
        await self.engine.close()
        if "embedder" in vars(self):
            self.embedder.close()
        if self.templates is not None:
            await asyncio.to_thread(self.templates.close)

    @cached_property
    def embedder(self) -> Embedder:
        """What embeds with its weights."""
        from jupyter_llmcloud.inference.openai.embedding.embedder import Embedder

        return Embedder(self.loaded)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Inside, nothing computes with its weights but the engine: what is embedded for the first time waits, too."""
        async with AsyncExitStack() as stack:
            with contextlib.suppress(ModelError):  # there is nothing that could embed with them
                await stack.enter_async_context(self.embedder.still())
            yield

    def adapter_of(self, name: str) -> str:
        """The adapter that a model's name stands for: `NAME:ADAPTER`, or the adapter's own name; "": the model itself.

        Raises `ApiError` 404 for a name of neither.
        """
        if name == self.served_name:
            return ""
        adapter = name.removeprefix(f"{self.served_name}:")
        if adapter not in getattr(self.engine, "names", ()):
            message = f"The model {name[:128]!r} does not exist here: this endpoint serves {self.served_name!r}."
            if reason := getattr(self.engine, "refused", {}).get(adapter):
                message = f"The adapter {adapter!r} does not go with the model that is served now: {reason}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return adapter

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return self.engine.context_length

    def cannot(self) -> frozenset[str]:
        """The fields of a generation that its engine cannot honour."""
        return self.engine.unsupported
