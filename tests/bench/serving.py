"""Tokens per second and the wait for the first one, of a replica with each engine, beside each other on the same weights.

A replica is its own process with one compute thread, asked over HTTP by streams that all begin at once. The peer is the
same replica with transformers' continuous batching in place of the slot engine: what lies between a client and the
engine is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.bench.measured import Row
from tests.bench.start import fresh
from tests.support.tiny_models import byte_level_tokenizer

ROUNDS = 3
STREAMS = (1, 8, 32)
NUM_PROMPT, NUM_GENERATED = 32, 64
SHARED_PREFIX = 512
VOCABULARY = 4096
ENGINES = ("slots", "continuous-batching")
PEER = "continuous batching"
TOKEN = "bench"
_DEADLINE_S = 180.0
_NEVER = {"1": -100.0}  # the end-of-sequence token: every answer has all its tokens


@dataclass
class Samples:
    """What one engine gave: by number of streams tokens per second, and milliseconds until each first token."""

    tokens_per_s: dict[int, list[float]] = field(default_factory=lambda: {number: [] for number in STREAMS})
    first_ms: dict[int, list[float]] = field(default_factory=lambda: {number: [] for number in STREAMS})
    cold_ms: list[float] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)


def measure(folder: Path) -> list[Row]:
    """Rounds of both engines in turn; every answer must be the same."""
    model = folder / "model"
    _save_model(model)
    served = {engine: Samples() for engine in ENGINES}
    for number in range(ROUNDS):
        for engine in ENGINES:
            with fresh(folder / f"round-{number}-{engine}") as place:
                asyncio.run(_measure_replica(place, model, engine, served[engine], number))
    ours, theirs = (served[engine] for engine in ENGINES)
    if ours.answers != theirs.answers:
        raise AssertionError("the engines answered differently")
    return _rows(ours, theirs)


def _rows(ours: Samples, theirs: Samples) -> list[Row]:
    what = f"serving 17 M parameters, {NUM_PROMPT} in, {NUM_GENERATED} out"
    rows = []
    for number in STREAMS:
        goal = 1.3 if number > 1 else 1.0
        speeds = ours.tokens_per_s[number], theirs.tokens_per_s[number]
        rows.append(Row("serving", f"{what}, {number} streams", "tokens/s", PEER, *speeds, goal, at_least=True))
        waits = ours.first_ms[number], theirs.first_ms[number]
        rows.append(Row("serving", f"first token, {number} streams, p95", "ms", PEER, *waits, 1.0, percent=95))
    shared = f"first token, {SHARED_PREFIX} tokens as before"
    rows.append(Row("serving", shared, "ms", "ours, not read before", ours.warm_ms, ours.cold_ms, 0.2))
    rows.append(Row("serving", "memory of a replica after 32 streams", "MiB", PEER, ours.memory_mib, theirs.memory_mib))
    return rows


def _save_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, initializer_range=0.05, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)


async def _measure_replica(place: Path, model: Path, engine: str, samples: Samples, number: int) -> None:
    async with _replica(place, model, engine) as (client, process):
        ask = _client_asks(client)
        await ask(_prompt(-1, NUM_PROMPT), 4)
        for streams in STREAMS:
            seeds = [1000 * streams + index for index in range(streams)]
            began = time.perf_counter()
            answers = await asyncio.gather(*(ask(_prompt(seed, NUM_PROMPT), NUM_GENERATED) for seed in seeds))
            seconds = time.perf_counter() - began
            samples.tokens_per_s[streams].append(streams * NUM_GENERATED / seconds)
            samples.first_ms[streams] += [1000 * first_s for first_s, _ in answers]
            samples.answers |= {seed: text for seed, (_, text) in zip(seeds, answers, strict=True)}
        samples.memory_mib.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        shared = _prompt(-2 - number, SHARED_PREFIX)
        samples.cold_ms.append(1000 * (await ask([*shared, 5], 1))[0])
        samples.warm_ms.append(1000 * (await ask([*shared, 6], 1))[0])


def _prompt(seed: int, length: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(2, 300) for _ in range(length)]


Ask = Callable[[list[int], int], Awaitable[tuple[float, str]]]


def _client_asks(client: aiohttp.ClientSession) -> Ask:
    async def ask(prompt: list[int], max_tokens: int) -> tuple[float, str]:
        """Seconds until the first token, and the text."""
        body = {
            "model": "bench", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "logit_bias": _NEVER,
        }  # fmt: skip
        began, first_s, text = time.perf_counter(), None, ""
        async with client.post("http://replica/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    first_s = first_s or time.perf_counter() - began
                    text += json.loads(line[6:])["choices"][0]["text"]
        if first_s is None:
            raise AssertionError("no token came")
        return first_s, text

    return ask


@contextlib.asynccontextmanager
async def _replica(
    place: Path, model: Path, engine: str
) -> AsyncIterator[tuple[aiohttp.ClientSession, subprocess.Popen[bytes]]]:
    socket = place / "replica.sock"
    spec: dict[str, Any] = {
        "endpoint": "bench", "model": str(model), "socket": str(socket), "token": TOKEN, "served_name": "bench",
        "num_threads": 1, "engine": engine,
    }  # fmt: skip
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_llmcloud.inference"], stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(spec).encode() + b"\n")
    process.stdin.flush()
    try:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        connector = aiohttp.UnixConnector(str(socket), limit=0)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as client:
            await asyncio.wait_for(_ready(client, process, engine), _DEADLINE_S)
            yield client, process
    finally:
        process.stdin.close()
        process.wait(_DEADLINE_S)


async def _ready(client: aiohttp.ClientSession, process: subprocess.Popen[bytes], engine: str) -> None:
    while process.poll() is None:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with client.get("http://replica/readyz") as response:
                told = await response.json()
                if told["state"] == "ready":
                    if told["engine"] != engine:
                        raise AssertionError(f"{told['engine']} serves instead of {engine}")
                    return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the replica ended with {process.returncode}")
