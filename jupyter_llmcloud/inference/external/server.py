"""One server of others: its process when it was started here, its health, and the connections to it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import aiohttp

from jupyter_llmcloud.core.serving.models.engine_names import is_url
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.external.commands import EngineOptions, command_of

log = logging.getLogger(__name__)

START_TIMEOUT_S = 900.0
POLL_S = 0.2
WATCH_EVERY_S = 5.0
PROBE_TIMEOUT_S = 10.0
MAX_SILENT = 3
STOP_GRACE_S = 3.0
MAX_PORTS = 3  # that are tried: another process may take one between its choice and its use
_LAST_LINES = 6
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ExternalServer:
    """An OpenAI-compatible server.

    Attributes:
        engine: "vllm", "llama.cpp" or a URL.
        model: the model's name there.
        base_url: up to /v1, without a slash at its end.
        failure: None, or why it answers no more.
        on_failure: called once, when `failure` was set.
    """

    def __init__(self, engine: str, model: str, base_url: str, key: str) -> None:
        self.engine = engine
        self.model = model
        self.base_url = base_url
        self.failure: str | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._key = key
        self._session: aiohttp.ClientSession | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_elsewhere(self) -> bool:
        """Whether somebody else runs it."""
        return is_url(self.engine)

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to it."""
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            timeout = aiohttp.ClientTimeout(total=None, connect=10)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector)
        return self._session

    async def close(self) -> None:
        """End the process, if it is ours, and the connections."""
        for task in self._tasks:
            task.cancel()
        if self._session is not None:
            await self._session.close()
        process = self._process
        if process is not None and process.returncode is None:
            _signal(process.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_GRACE_S):
                    await process.wait()
            except TimeoutError:
                _signal(process.pid, signal.SIGKILL)
                await process.wait()

    # --- what it says of itself ---

    async def models(self) -> dict[str, dict[str, Any]]:
        """The models that it lists, by name; raises ModelError when it refuses, and OSError or aiohttp's errors."""
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with self.session.get(f"{self.base_url}/models", timeout=timeout) as response:
            if response.status in (401, 403):
                raise ModelError(
                    f"{self.base_url} refuses the key (status {response.status}): name the environment variable that "
                    "holds the right one: --api-key-env NAME."
                )
            if response.status in (404, 405):
                return {}  # it lists none
            response.raise_for_status()
            told = await response.json(content_type=None)
        rows = told.get("data", []) if isinstance(told, dict) else []
        return {str(row["id"]): row for row in rows if isinstance(row, dict) and "id" in row}

    # --- its life ---

    async def start(self, options: EngineOptions) -> None:
        """Start the process and wait until it answers. Raises ModelError with its last words."""
        command = command_of(self.engine, options)
        log.info("starting %s", " ".join(command.arguments))
        self._process = await asyncio.create_subprocess_exec(
            *command.arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **command.env},
            process_group=0,
            preexec_fn=_end_with_parent,
        )
        self._tasks.append(asyncio.create_task(self._read()))
        await self._wait_ready()
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _read(self) -> None:
        """Its output goes to our log; nobody may leave it waiting for a full pipe."""
        assert self._process is not None and self._process.stdout is not None
        while piece := await self._process.stdout.read(1 << 16):
            text = piece.decode(errors="replace")
            self._said.extend(line.rstrip() for line in text.splitlines() if line.strip())
            sys.stderr.write(text)

    async def _wait_ready(self) -> None:
        assert self._process is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._is_ready():
                    if self._process.returncode is not None:
                        await asyncio.sleep(POLL_S)  # its last lines
                        raise ModelError(self._ended())
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ModelError(f"{self.engine} was not ready within {START_TIMEOUT_S:.0f} s: {self._words()}") from None

    async def _is_ready(self) -> bool:
        root = self.base_url.removesuffix("/v1")
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with self.session.get(f"{root}/health", timeout=timeout) as response:
                if response.status != 404:
                    return response.status == 200
            await self.models()
        except (aiohttp.ClientError, OSError, TimeoutError, ModelError):
            return False
        return True

    async def _watch(self) -> None:
        """Notice that it ended, or answers no more."""
        assert self._process is not None
        num_silent = 0
        while num_silent < MAX_SILENT:
            try:
                async with asyncio.timeout(WATCH_EVERY_S):
                    await self._process.wait()
                self._fail(self._ended())
                return
            except TimeoutError:
                num_silent = 0 if await self._is_ready() else num_silent + 1
        self._fail(f"{self.engine} did not answer {MAX_SILENT} times in a row: {self._words()}")

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.on_failure()

    def _ended(self) -> str:
        assert self._process is not None
        return f"{self.engine} ended with status {self._process.returncode}: {self._words()}"

    def _words(self) -> str:
        return " | ".join(self._said) or "it said nothing."


async def started(engine: str, make_options: Callable[[int, str], EngineOptions]) -> ExternalServer:
    """A server that was started here and answers; `make_options` takes its port and its key. Raises ModelError."""
    for attempt in range(MAX_PORTS):
        key, port = secrets.token_urlsafe(24), _free_port()
        options = make_options(port, key)
        server = ExternalServer(engine, options.name, f"http://127.0.0.1:{port}/v1", key)
        try:
            await server.start(options)
            return server
        except BaseException as error:
            await server.close()
            if not isinstance(error, ModelError) or "in use" not in str(error) or attempt == MAX_PORTS - 1:
                raise
    raise AssertionError("not reached")


async def elsewhere(url: str, model: str, key_variable: str) -> ExternalServer:
    """A server that somebody runs, which answers with our key and has the model. Raises ModelError."""
    key = ""
    if key_variable:
        key = os.environ.get(key_variable, "")
        if not key:
            raise ModelError(
                f"the environment variable {key_variable} is not set where models are served: set it before the "
                "Jupyter server and its cluster are started."
            )
    server = ExternalServer(url, model, url, key)
    try:
        models = await server.models()
        if models and model not in models:
            raise ModelError(f"{url} has no model {model!r}. It has: {', '.join(list(models)[:8])}.")
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        await server.close()
        raise ModelError(f"{url} is no OpenAI server that answers: {error or type(error).__name__}.") from None
    except BaseException:
        await server.close()
        raise
    return server


def _end_with_parent() -> None:
    """In the new process: SIGKILL when the replica has gone, however that was."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
