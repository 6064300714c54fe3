"""Tokens per second and the wait for the first one, of a replica beside others on the same weights.

Streams all begin at once. One peer is the same replica with transformers' continuous batching in place of the slot
engine: what lies between a client and the engine is the same. The others are servers of their own. `--peers` chooses
some of them. All are up from the beginning and are asked in turn; those whose turn it is not are stopped meanwhile, since
some servers that have nothing to do are busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.bench.measured import Row, percentile
from tests.bench.peers import PeerMissing
from tests.bench.serving_peers import CONTENDERS, Server, letters
from tests.bench.speculation import speculation_rows
from tests.bench.start import fresh
from tests.support.tiny_models import byte_level_tokenizer

REPEATS = 6
ROUNDS = {1: 4, 8: 1, 32: 1}  # of a repeat, by number of streams: one alone is soon over, and says little
STREAMS = tuple(ROUNDS)
ROUND_TIMEOUT_S = 300.0
NUM_PROMPT, NUM_GENERATED = 32, 64
SHARED_PREFIX = 512
VOCABULARY = 4096
OURS, CB, LLAMA_CPP = "slots", "continuous-batching", "llama.cpp"
PEERS = tuple(name for name in CONTENDERS if name != OURS)
# What ours should be of the speed of each of them, at 1 stream and at more; None: it only informs.
GOALS: dict[str, tuple[float | None, float]] = dict.fromkeys(PEERS, (None, 1.0)) | {
    CB: (1.0, 1.3),
    LLAMA_CPP: (0.8, 1.0),
}


@dataclass
class Samples:
    """What one server gave.

    By number of streams: tokens per second, processor time a token, and of each repeat the 95th percentile of the waits
    for a first token. One over all repeats would be that of the slowest of them.
    """

    tokens_per_s: dict[int, list[float]] = field(default_factory=lambda: {number: [] for number in STREAMS})
    first_ms: dict[int, list[float]] = field(default_factory=lambda: {number: [] for number in STREAMS})
    processor_ms: dict[int, list[float]] = field(default_factory=lambda: {number: [] for number in STREAMS})
    cold_ms: list[float] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    ready_mib: list[float] = field(default_factory=list)
    stream_mib: list[float] = field(default_factory=list)
    kept_mib: list[float] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)
    missing: str = ""

    def share_of(self, others: dict[int, str]) -> float:
        """Which share of these answers is that of others."""
        return sum(others.get(seed) == text for seed, text in self.answers.items()) / max(1, len(self.answers))


def measure(folder: Path, peers: Collection[str] = PEERS) -> list[Row]:
    """All servers in turn, several times; both engines of ours must answer the same."""
    model = folder / "model"
    save_model(model)
    given = {name: Samples() for name in CONTENDERS if name == OURS or name in peers}
    asyncio.run(_measure_all(folder, model, given))
    if CB in given and given[OURS].answers != given[CB].answers:
        raise AssertionError("the engines answered differently")
    speculation = speculation_rows(model) if set(peers) == set(PEERS) else []
    return [*_rows(given), *speculation]


async def _measure_all(folder: Path, model: Path, given: dict[str, Samples]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        servers = {}
        for number, (name, samples) in enumerate(given.items()):
            place = stack.enter_context(fresh(folder / str(number)))
            try:
                server = await stack.enter_async_context(CONTENDERS[name](place, model, name))
            except PeerMissing as reason:
                samples.missing = str(reason)
                continue
            servers[name] = server
            stack.callback(server.go_on)
            with _excused(name, samples):
                await server.ask(prompt_of(-1, NUM_PROMPT), 4)
                samples.ready_mib.append(server.mib)
            server.pause()
        for repeat in range(REPEATS):
            for name, server in servers.items():
                if given[name].missing:
                    continue
                server.go_on()
                with _excused(name, given[name]):
                    async with asyncio.timeout(ROUND_TIMEOUT_S):
                        await _measure_server(server, name, given[name], repeat)
                server.pause()


@contextlib.contextmanager
def _excused(name: str, samples: Samples) -> Iterator[None]:
    """A peer that fails leaves the table, and the others stay in it; ours must not fail."""
    try:
        yield
    except (AssertionError, aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
        if name in (OURS, CB):
            raise
        samples.missing = f"it failed while it was asked: {error or type(error).__name__}"[:200]


def _rows(given: dict[str, Samples]) -> list[Row]:
    what = f"serving 17 M parameters, {NUM_PROMPT} in, {NUM_GENERATED} out"
    ours, peers = given[OURS], {name: samples for name, samples in given.items() if name != OURS}
    rows = []
    for number in STREAMS:
        for peer, theirs in peers.items():
            speeds = ours.tokens_per_s[number], theirs.tokens_per_s[number]
            rows.append(
                Row("serving", f"{what}, {number} streams", "tokens/s", peer, *speeds, GOALS[peer][number > 1],
                    at_least=True, missing=theirs.missing)
            )  # fmt: skip
            waits = ours.first_ms[number], theirs.first_ms[number]
            rows.append(
                Row("serving", f"first token, {number} streams, p95", "ms", peer, *waits, 1.0, missing=theirs.missing)
            )
            costs = ours.processor_ms[number], theirs.processor_ms[number]
            rows.append(
                Row("serving", f"processor time a token, {number} streams", "ms", peer, *costs, missing=theirs.missing)
            )
    shared = f"first token, {SHARED_PREFIX} tokens as before"
    rows.append(Row("serving", shared, "ms", "ours, not read before", ours.warm_ms, ours.cold_ms, 0.2))
    rows.append(Row("serving", "memory kept for prompts that begin alike", "MiB", "", ours.kept_mib))
    for peer, theirs in peers.items():
        memory = "memory of a server that is ready", "MiB", peer, ours.ready_mib, theirs.ready_mib
        rows.append(Row("serving", *memory, missing=theirs.missing))
        each = "memory that each of 32 streams adds", "MiB", peer, ours.stream_mib, theirs.stream_mib
        rows.append(Row("serving", *each, missing=theirs.missing))
        if not theirs.missing:
            rows.append(Row("serving", f"answers that {peer} gives, too", "share", "", [theirs.share_of(ours.answers)]))
    return rows


def save_model(folder: Path) -> None:
    """A Llama with random weights, whose tokens all have a text, so that each is an event of a stream."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=2048, initializer_range=0.05, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    known = tokenizer["model"]["vocab"]
    known |= {f"Ġt{token}": token for token in range(len(known), VOCABULARY)}
    path.write_text(json.dumps(tokenizer))


async def _measure_server(server: Server, name: str, samples: Samples, repeat: int) -> None:
    await server.ask(prompt_of(-1, NUM_PROMPT), 4)  # it is awake
    rounds = [(streams, number) for streams, count in ROUNDS.items() for number in range(count)]
    waits: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    for streams, number in rounds:
        seeds = [10_000 * repeat + 1000 * streams + 100 * number + index for index in range(streams)]
        spent_s, began = server.processor_s(), time.perf_counter()
        answers = await asyncio.gather(*(server.ask(prompt_of(seed, NUM_PROMPT), NUM_GENERATED) for seed in seeds))
        seconds = time.perf_counter() - began
        spent_s = server.processor_s() - spent_s
        samples.processor_ms[streams].append(1000 * spent_s / (streams * NUM_GENERATED))
        samples.tokens_per_s[streams].append(streams * NUM_GENERATED / seconds)
        waits[streams] += [1000 * first_s for first_s, _ in answers]
        samples.answers |= {seed: text for seed, (_, text) in zip(seeds, answers, strict=True)}
    for streams, first_ms in waits.items():
        samples.first_ms[streams].append(percentile(first_ms, 95))
    kept_mib = await server.kept_mib() if name == OURS else 0.0
    samples.stream_mib.append((server.mib - samples.ready_mib[0] - kept_mib) / max(STREAMS))
    if name == OURS:
        samples.kept_mib.append(kept_mib)
        shared = prompt_of(-2 - repeat, SHARED_PREFIX)
        samples.cold_ms.append(1000 * (await server.ask([*shared, next(iter(letters()))], 1))[0])
        samples.warm_ms.append(1000 * (await server.ask([*shared, list(letters())[1]], 1))[0])


def prompt_of(seed: int, length: int) -> list[int]:
    """Random tokens, whose text is the same prompt."""
    return random.Random(seed).choices(list(letters()), k=length)
