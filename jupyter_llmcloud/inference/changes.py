"""What changes in a replica while it serves: its weights, and the adapters beside them. Only its endpoint may ask."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
from aiohttp import web

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import LLMCloudError

if TYPE_CHECKING:
    from jupyter_llmcloud.inference.openai.completion import ServedModel

log = logging.getLogger(__name__)
Asked = TypeVar("Asked")


class Reload(msgspec.Struct):
    """Other weights of the same shapes.

    Attributes:
        model: the folder that they are in.
        revision: the number under which the endpoint knows them.
    """

    model: str
    revision: int = 0
    dtype: str = "auto"


class LoadAdapter(msgspec.Struct):
    """An adapter of PEFT for the model that is served; `folder` "" takes it away."""

    name: str
    folder: str = ""


class Changes:
    """The routes. `model` gives what is served; one change at a time."""

    def __init__(self, model: Callable[[], ServedModel]) -> None:
        self._model = model
        self._one_at_a_time = asyncio.Lock()

    def add_to(self, app: web.Application) -> None:
        """Answer on an application."""
        app.router.add_post("/reload", self.reload)
        app.router.add_post("/adapters", self.load_adapter)

    async def reload(self, request: web.Request) -> web.Response:
        """POST /reload: 200 when every request from now on is answered with these weights, 409 when none is."""
        asked = _decode(await request.read(), Reload)
        async with self._one_at_a_time:
            served = self._model()
            from jupyter_llmcloud.inference.engines.reload import take_weights

            try:
                await take_weights(served.loaded, served.engine, asked.model, served.still)
            except LLMCloudError as error:
                raise ApiError(409, str(error), code="not_reloaded") from None
        log.info("has the weights of %s (revision %d) now", asked.model, asked.revision)
        return web.json_response({"revision": asked.revision})

    async def load_adapter(self, request: web.Request) -> web.Response:
        """POST /adapters: load an adapter, or take one away when no folder is given."""
        asked = _decode(await request.read(), LoadAdapter)
        async with self._one_at_a_time:
            served = self._model()
            from jupyter_llmcloud.inference.engines.with_adapters import adapters_of

            engines = adapters_of(served)
            try:
                if asked.folder:
                    await engines.load(asked.name, asked.folder)
                else:
                    await engines.unload(asked.name)
            except LLMCloudError as error:
                raise ApiError(409, str(error), code="adapter_not_loaded") from None
        return web.json_response({"adapters": sorted(engines.names)})


def _decode(body: bytes, kind: type[Asked]) -> Asked:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise ApiError(400, f"the body is not a {kind.__name__}: {error}.") from None
