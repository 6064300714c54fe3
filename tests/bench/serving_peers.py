"""Who generates beside us: replicas of ours with one engine or the other, and llama.cpp's server on the same weights.

Each is its own process with one compute thread, asked by OpenAI's completions over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.bench.peers import python_with
from tests.bench.shell import REPOSITORY

TOKEN = "bench"
NUM_PARALLEL = 32
_DEADLINE_S = 300.0
_LLAMA_CPP = REPOSITORY / "tests" / "bench" / "bodies" / "llama_cpp_server.py"
_LLAMA_CPP_TOKENS = 256


@dataclass
class Server:
    """One that is up.

    Attributes:
        client: of its address.
        base: where its routes begin.
        process: that serves.
    """

    client: aiohttp.ClientSession
    base: str
    process: psutil.Process

    @property
    def mib(self) -> float:
        """Memory that it takes."""
        return self.process.memory_info().rss / 2**20

    async def ask(self, prompt: list[int], max_tokens: int) -> tuple[float, str]:
        """Seconds until the first token, and the text. Greedy, and as long as is asked for."""
        body = {
            "model": "bench", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True,
        }  # fmt: skip
        began, first_s, text, reason = time.perf_counter(), None, "", None
        async with self.client.post(f"{self.base}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    first_s = first_s or time.perf_counter() - began
                    choice = json.loads(line[6:])["choices"][0]
                    text, reason = text + choice["text"], choice["finish_reason"] or reason
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
        connector = aiohttp.UnixConnector(str(socket), limit=0)
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
    command = [python, _LLAMA_CPP, model, place, NUM_PARALLEL, _LLAMA_CPP_TOKENS]
    with _started(place, [str(part) for part in command], subprocess.PIPE) as process:
        assert process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), _DEADLINE_S)
        if not line.startswith(b"http"):
            raise AssertionError(f"llama.cpp's server did not start: {(place / 'log').read_text()[-2000:]}")
        # It closes connections that were quiet for a while, whoever is about to use them.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as client:
            yield Server(client, line.decode().strip(), psutil.Process(process.pid))


@contextlib.contextmanager
def _started(place: Path, command: list[str], stdout: int | None = None) -> Any:
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout or log, stderr=log)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(_DEADLINE_S)
        if process.stdout is not None:
            process.stdout.close()
