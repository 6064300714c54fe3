"""The life of a replica: bind, load, try, ready, drain, exit."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
from aiohttp import web

from jupyter_llmcloud import config
from jupyter_llmcloud.core.serving.models.engine_names import AUTO, LLAMA_CPP, is_external, is_url
from jupyter_llmcloud.core.serving.models.model_kind import EMBEDDER, GENERATOR, ModelKind, says
from jupyter_llmcloud.errors import LLMCloudError, ModelError, UsageError
from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.core_allocation import CoreAllocation
from jupyter_llmcloud.inference.engines.loading import LoadedModel, defaults_for_sampling, load_model, refuse_spread
from jupyter_llmcloud.inference.external.forward import Forward
from jupyter_llmcloud.inference.external.opening import ExternalSpec, details, open_external
from jupyter_llmcloud.inference.kind import kind_of
from jupyter_llmcloud.inference.open_inference.batching import QUEUE_FACTOR
from jupyter_llmcloud.inference.open_inference.opening import PredictorSpec, is_code, open_predictor, work_in
from jupyter_llmcloud.inference.openai.chat.templates import Templates
from jupyter_llmcloud.inference.openai.completion import ServedModel
from jupyter_llmcloud.storage.model_folder import ModelLayout, check_folder, has_tokenizer
from jupyter_llmcloud.storage.models import served_code
from jupyter_llmcloud.system import unix_sockets

if TYPE_CHECKING:
    from jupyter_llmcloud.inference.engines.base import Engine
    from jupyter_llmcloud.inference.openai.embedding.encoders import ServedEncoder

log = logging.getLogger(__name__)

_LINGER_S = 2.0
_POLL_S = 0.05
_ALLOCATE_EVERY_S = 1.0
_WORKING = 10  # the part of --memory that is kept for what a step computes with


class ReplicaSpec(msgspec.Struct, kw_only=True, frozen=True):
    """The line of JSON that tells a replica what to be.

    Attributes:
        endpoint: the endpoint it belongs to.
        model: absolute path of a folder in the Hugging Face layout.
        socket: path of the unix socket to bind.
        token: the bearer token that requests must carry.
        served_name: the model's name in requests and replies.
        dtype: auto, float32, bfloat16 or float16.
        base_model: of an adapter, the folder of its base model.
        source: a file with code of the user's own: a cell, an object, or the architecture of a run's model.
        max_concurrent: sequences in one batch.
        max_model_len: tokens of prompt and answer together; by default as many as the model was made for.
        num_threads: CPU threads of the engine; by default its share of all cores but one, beside other replicas.
        device: cpu, cuda:N, or cuda:N,M for a model that is spread over several.
        cores: that it has to itself among replicas; None: it shares them.
        memory_bytes: what it may take of its host's memory; None: not stated.
        cache_bytes: what keys and values may take; None: a share of what is free.
        adapters: folders of adapters of PEFT, by the names under which they are asked for.
        engine: as in `core.serving.models.engine_names`.
        api_key_env: of an engine elsewhere, the environment variable that holds its key.
        drain_s: how long a SIGTERM lets requests finish.
    """

    endpoint: str
    model: str
    socket: str
    token: str
    served_name: str
    dtype: str = "auto"
    base_model: str = ""
    source: str = ""
    max_concurrent: int = 32
    max_model_len: int | None = None
    num_threads: int | None = None
    device: str = "cpu"
    cores: int | None = None
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    adapters: dict[str, str] = {}
    engine: str = "auto"
    api_key_env: str = ""
    drain_s: float = 5.0

    @classmethod
    def parse(cls, line: str | bytes) -> ReplicaSpec:
        """Read the line; raises `UsageError`. Names that are not known are left to whoever wrote them."""
        try:
            spec = msgspec.json.decode(line, type=cls)
        except msgspec.MsgspecError as error:
            raise UsageError(f"the spec on stdin is not valid: {error}") from None
        numbers = (spec.max_concurrent, spec.num_threads, spec.max_model_len)
        if not spec.token or any(number is not None and number < 1 for number in numbers):
            raise UsageError("the spec on stdin needs a token, and max_concurrent, num_threads, max_model_len >= 1.")
        return spec

    @property
    def threads(self) -> int:
        """CPU threads of the engine at most. One core is left to HTTP and to whoever else is there."""
        return self.num_threads or max(1, len(os.sched_getaffinity(0)) - 1)


class Replica:
    """Serves one model until it is told to stop, its agent is gone, or its engine has failed."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        self.status = ReplicaStatus(spec.endpoint, spec.served_name, spec.max_concurrent)
        self._application = Application(self.status, spec.token)
        self._share = CoreAllocation(config.runtime_dir() / "replicas", spec.num_threads)
        self._stop = asyncio.Event()
        self._abandoned = asyncio.Event()

    async def run(self, stdin: int | None = None) -> int:
        """Serve; returns the exit status. The end of the file `stdin` means that the agent is gone."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        if stdin is not None:
            _on_eof(stdin, lambda: loop.call_soon_threadsafe(self._abandon))
        self._share.join()
        runner = web.AppRunner(self._application.build(), handler_cancellation=True, access_log=None)
        await runner.setup()
        with _bound(Path(self._spec.socket)) as listener:
            try:
                await web.SockSite(runner, listener, shutdown_timeout=1.0).start()
                return await self._serve()
            finally:
                await runner.cleanup()
                Path(self._spec.socket).unlink(missing_ok=True)
                self._share.leave()

    async def _serve(self) -> int:
        loading = asyncio.create_task(self._load())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()  # the thread that loads goes on; the process ends without it
            return 0
        if error := loading.exception():
            return await self._fail(str(error) if isinstance(error, LLMCloudError) else f"{error!r}")
        sharing = asyncio.create_task(self._allocate_cores())
        await stopping
        sharing.cancel()
        if self.status.state == "failed":
            return await self._fail(self.status.reason)
        await self._drain()
        return 0

    async def _load(self) -> None:
        layout, kind = await asyncio.to_thread(_layout_and_kind, self._spec)
        if kind in ("module", "python") and await asyncio.to_thread(_has_tokenizer, layout, self._spec.source):
            kind = await self._load_own(kind)
        self._application.kind = kind
        if self._application.model is None:
            await self._open(kind, layout)
        # What was imported and loaded stays: a collection that looked at all of it would stop every stream for a while.
        gc.collect()
        gc.freeze()
        self.status.state = "ready"
        log.info("ready: %s", self.status.details)

    async def _open(self, kind: ModelKind, layout: ModelLayout | None) -> None:
        if kind != GENERATOR:
            refuse_spread(self._spec.device, f"a model that {says(kind)}")
        if kind == GENERATOR:
            if not await self._open_external():
                await self._load_generator()
        elif kind == EMBEDDER and layout is not None:
            await self._load_encoder(layout)
        else:
            await self._load_predictor(layout, kind)

    async def _open_external(self) -> bool:
        """Have another server generate, where that is asked for or is the better choice."""
        spec = self._spec
        if spec.source or spec.base_model:
            if is_external(spec.engine):
                raise ModelError(f"--engine {spec.engine} serves whole models of known architectures only.")
            return False
        if spec.adapters and spec.engine == AUTO:
            return False  # which only engines of our own load
        external = ExternalSpec(
            spec.engine, spec.model, spec.served_name, spec.dtype, spec.device, spec.max_concurrent,
            spec.max_model_len, self._share.num_threads(), spec.api_key_env,
        )  # fmt: skip
        server = await open_external(external)
        if server is None:
            return False
        server.on_failure = lambda: self._engine_failed(server.failure)
        self._application.external = Forward(server, spec.served_name, self.status, QUEUE_FACTOR * spec.max_concurrent)
        self.status.details = {
            "model": spec.served_name,
            "kind": GENERATOR,
            "max_concurrent": QUEUE_FACTOR * spec.max_concurrent,  # whatever waits does so there
            "adapters_refused": dict.fromkeys(spec.adapters, f"{server.engine} loads no adapters here"),
            **await details(server, external),
        }
        return True

    async def _load_own(self, kind: ModelKind) -> ModelKind:
        """Open a model of the user's own as a generator, when it is one; returns what it turned out to be."""
        from jupyter_llmcloud.inference.own_models.causal_module import NotAGenerator
        from jupyter_llmcloud.inference.own_models.opening import open_forward

        try:
            await self._load_generator()
        except NotAGenerator as error:
            log.info("not a generator: %s", error)
            return kind
        if (model := self._application.model) is not None:
            forward = open_forward(model.loaded, self._spec.served_name, self._spec.max_concurrent)
            if forward is not None:
                self._application.serve_predictions(forward)  # whoever has asked it by tensors may go on
        return GENERATOR

    async def _load_predictor(self, layout: ModelLayout | None, kind: str) -> None:
        spec, num_threads = self._spec, self._share.num_threads()
        served = await open_predictor(
            PredictorSpec(
                spec.served_name, kind, layout, spec.source, spec.dtype, spec.device, spec.max_concurrent, num_threads
            )
        )
        self._application.serve_predictions(served)
        self.status.details = {
            "model": spec.served_name,
            "kind": kind,
            "engine": served.metadata()["platform"],
            "max_concurrent": QUEUE_FACTOR
            * spec.max_concurrent,  # the queue is here, so that batches can be made of it
            "num_threads": num_threads,
            "device": spec.device,
            **served.predictor.details,
        }

    async def _load_encoder(self, layout: ModelLayout) -> None:
        spec, num_threads = self._spec, self._share.num_threads()
        served = await asyncio.to_thread(_open_encoder, layout, spec, num_threads)
        self.status.details = {
            "model": spec.served_name,
            "kind": EMBEDDER,
            "engine": "encoder",
            "context_length": served.context_length,
            "max_concurrent": QUEUE_FACTOR * spec.max_concurrent,
            "num_parameters": served.loaded.num_parameters,
            "num_threads": num_threads,
            "dtype": str(served.loaded.model.dtype).removeprefix("torch."),
            "device": str(served.loaded.model.device),
        }
        self._application.encoder = served

    async def _load_generator(self) -> None:
        model = await open_model(self._spec, self._engine_failed, self._share.num_threads())
        spec, loaded = self._spec, model.loaded
        await load_adapters(model, spec.adapters)
        self.status.details = {
            "model": spec.served_name,
            "kind": GENERATOR,
            "engine": model.engine.name,
            "num_parallel": model.engine.num_parallel,
            "context_length": model.engine.context_length,
            "max_concurrent": spec.max_concurrent,
            "num_parameters": loaded.num_parameters,
            "num_threads": model.engine.num_threads,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": str(loaded.model.device),
            "chat_template": "model" if getattr(loaded.tokenizer, "chat_template", None) else "plain",
        }
        self._application.model = model

    async def _allocate_cores(self) -> None:
        """Use as many threads as there are, while other replicas of the host come and go."""
        engine = self._application.model.engine if self._application.model is not None else None
        while engine is not None:
            await asyncio.sleep(_ALLOCATE_EVERY_S)
            engine.num_threads = self.status.details["num_threads"] = self._share.num_threads()

    def _engine_failed(self, reason: str | None = None) -> None:
        model = self._application.model
        reason = reason or (model.engine.failure if model is not None else None)
        if self.status.state == "ready":
            self.status.state, self.status.reason = "failed", reason or "the engine failed"
            self._stop.set()

    def _abandon(self) -> None:
        self._abandoned.set()
        self._stop.set()

    async def _fail(self, reason: str) -> int:
        """Say why, long enough for the agent's next look at /readyz, and give up."""
        log.error("cannot serve: %s", reason)
        self.status.state, self.status.reason = "failed", reason
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await self._abandoned.wait()
        return 1

    async def _drain(self) -> None:
        self.status.state = "draining"
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._spec.drain_s
        while self.status.num_open and not self._abandoned.is_set() and clock() < deadline:
            await asyncio.sleep(_POLL_S)
        if self._application.model is not None:
            await self._application.model.close()
        if self._application.external is not None:
            await self._application.external.server.close()
        if self._application.encoder is not None:
            self._application.encoder.close()
        await self._application.end_predictions()


def _layout_and_kind(spec: ReplicaSpec) -> tuple[ModelLayout | None, ModelKind]:
    """What is to be loaded, before it is. Raises ModelError."""
    if is_code(spec.source):
        return None, "python"
    if is_url(spec.engine) or spec.engine == LLAMA_CPP:
        return None, GENERATOR
    base = Path(spec.base_model) if spec.base_model else None
    layout = check_folder(Path(spec.model), base, is_own=bool(spec.source))
    return layout, kind_of(layout)


def _open_encoder(layout: ModelLayout, spec: ReplicaSpec, num_threads: int) -> ServedEncoder:
    import torch

    from jupyter_llmcloud.inference.openai.embedding.encoders import open_encoder

    torch.set_num_threads(num_threads)
    return open_encoder(layout, spec.served_name, spec.dtype, spec.device)


async def load_adapters(model: ServedModel, adapters: dict[str, str]) -> None:
    """Those that the endpoint has. One that cannot be loaded is not answered for, and the others are."""
    from jupyter_llmcloud.inference.engines.with_adapters import adapters_of

    for name, folder in adapters.items():
        try:
            await adapters_of(model).load(name, folder)
        except LLMCloudError as error:
            log.error("adapter %s is not loaded: %s", name, error)


def cache_budget(cache_bytes: int | None, memory_bytes: int | None) -> int | None:
    """What keys and values may take of the memory that was stated, now that the model is loaded. Raises ModelError."""
    if memory_bytes is None:
        return cache_bytes
    taken = psutil.Process().memory_info().rss
    left = memory_bytes - taken - memory_bytes // _WORKING
    if left <= 0:
        raise ModelError(
            f"the model takes {taken / 2**30:.2f} GiB once it is loaded, and --memory allows "
            f"{memory_bytes / 2**30:.2f} GiB, of which a tenth is for what a step computes with: allow more."
        )
    return left if cache_bytes is None else min(left, cache_bytes)


async def open_model(
    spec: ReplicaSpec, on_failure: Callable[[], None] = lambda: None, num_threads: int | None = None
) -> ServedModel:
    """Load the model of `spec` and open its engine; raises `ModelError`. Imports torch and transformers."""
    num_threads = num_threads or spec.threads
    loaded, defaults = await asyncio.to_thread(_load_on_thread, spec, num_threads)
    templates = Templates()
    if getattr(loaded.tokenizer, "chat_template", None):
        templates.prepare()
    try:
        loaded, engine = await _open_engine(spec, loaded, num_threads)
    except BaseException:
        templates.close()
        raise
    engine.on_failure = on_failure
    return ServedModel(loaded, engine, spec.served_name, defaults, templates)


async def _open_engine(spec: ReplicaSpec, loaded: LoadedModel, num_threads: int) -> tuple[LoadedModel, Engine]:
    """The engine, and the model that it has. One of the user's own may come without what `generate` takes."""
    from jupyter_llmcloud.inference.engines.select import open_engine

    try:
        return loaded, await open_engine(loaded, spec.max_concurrent, num_threads, spec.engine)
    except ModelError as error:
        if not spec.source or spec.engine not in (AUTO, "generate"):
            raise
        from jupyter_llmcloud.inference.own_models.causal_module import NotAGenerator
        from jupyter_llmcloud.inference.own_models.opening import without_generate

        log.warning("served by its forward alone: %s", error)
        try:
            other = await asyncio.to_thread(without_generate, loaded)
        except NotAGenerator:
            raise error from None
        return other, await open_engine(other, spec.max_concurrent, num_threads, spec.engine)


def _has_tokenizer(layout: ModelLayout | None, source: str) -> bool:
    """Whether a model of the user's own came with a tokenizer: then it may generate text."""
    if layout is not None:
        return layout.architecture is not None and has_tokenizer(layout.folder)
    path = Path(source)
    return path.name == served_code.OBJECT and bool(served_code.object_record(path)["has_tokenizer"])


def _load_on_thread(spec: ReplicaSpec, num_threads: int) -> tuple[LoadedModel, dict[str, float]]:
    import torch

    torch.set_num_threads(num_threads)
    base = spec.base_model or None
    loaded = _load_own(spec) if spec.source else None
    if loaded is None:
        loaded = load_model(
            spec.model, dtype=spec.dtype, device=spec.device, base_model=base, max_model_len=spec.max_model_len
        )
    loaded = dataclasses.replace(loaded, cache_bytes=cache_budget(spec.cache_bytes, spec.memory_bytes))
    return loaded, {} if is_code(spec.source) else defaults_for_sampling(base or spec.model)


def _load_own(spec: ReplicaSpec) -> LoadedModel:
    from jupyter_llmcloud.inference.own_models.opening import load_folder, load_object

    if not is_code(spec.source):
        return load_folder(Path(spec.model), spec.dtype, spec.device, spec.max_model_len)
    path = Path(spec.source)
    work_in(str(served_code.object_record(path)["folder"]))
    return load_object(path, spec.dtype, spec.device, spec.max_model_len)


def _on_eof(descriptor: int, callback: Callable[[], Any]) -> None:
    """Call back, from a thread, when nothing can be read any more."""

    def watch() -> None:
        # os.read and no file object: a buffered reader's lock would be held when the interpreter ends.
        while os.read(descriptor, 4096):
            pass
        callback()

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def _bound(path: Path) -> socket.socket:
    """A unix socket that only this user can open, from its first moment on."""
    try:
        return unix_sockets.bind(str(path))
    except OSError as error:
        raise UsageError(f"cannot bind {path}: {error}") from None
