"""What a replica takes of its host: threads, shared with the other replicas there, and memory, within its limits."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.core_allocation import CoreAllocation, cores_for
from jupyter_llmcloud.inference.engines.base import Engine, Generation, Sampling
from jupyter_llmcloud.inference.engines.generate import GenerateEngine
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.replica import cache_budget
from tests.inference.test_inference_replica import Running, settles, short_folder
from tests.support.tiny_models import one_thread, save_tiny_llama


@pytest.mark.parametrize(
    ("num_cores", "fixed", "num_sharing", "threads"),
    [(8, [], 1, 7), (8, [], 2, 3), (8, [3], 2, 2), (2, [], 1, 1), (2, [], 5, 1), (1, [], 1, 1), (4, [9], 1, 1)],
)
def test_the_cores_but_one_are_shared_out(num_cores: int, fixed: list[int], num_sharing: int, threads: int) -> None:
    assert cores_for(num_cores, fixed, num_sharing) == threads


CLAIM = """
import os, sys
from pathlib import Path
from jupyter_llmcloud.inference.core_allocation import claim_cores
claimed = claim_cores(Path(sys.argv[1]), int(sys.argv[2]))
print(sorted(claimed) == sorted(os.sched_getaffinity(0)), *claimed, flush=True)
sys.stdin.read()
"""


def test_cores_are_one_replicas_alone_and_free_again_when_it_has_ended(tmp_path: Path) -> None:
    all_cores = sorted(os.sched_getaffinity(0))

    def claim(number: int) -> tuple[subprocess.Popen[str], list[str]]:
        command = [sys.executable, "-c", CLAIM, str(tmp_path / "cores"), str(number)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().split()

    first, told = claim(1)
    assert told == ["True", str(all_cores[0])]
    second, told = claim(len(all_cores))
    assert told == ["True", *map(str, all_cores[1:])]
    for process in (first, second):
        process.communicate("")
    third, told = claim(1)
    third.communicate("")
    assert told == ["True", str(all_cores[0])]


def test_what_was_allowed_for_keys_and_values_is_not_exceeded(loaded_for_budget: LoadedModel) -> None:
    async def stats(cache_bytes: int | None) -> Any:
        engine = await open_engine(dataclasses.replace(loaded_for_budget, cache_bytes=cache_bytes), 4)
        try:
            return engine.stats()
        finally:
            await engine.close()

    with one_thread():
        small, large = (asyncio.run(stats(size)) for size in (1 << 20, None))
        assert 0 < small.max_cache_bytes <= 1 << 20 < large.max_cache_bytes
        with pytest.raises(ModelError, match="--kv-cache"):
            asyncio.run(stats(1000))


def test_memory_that_the_model_alone_takes_is_refused_and_what_is_left_is_for_keys_and_values() -> None:
    taken = psutil.Process().memory_info().rss
    with pytest.raises(ModelError, match="--memory allows"):
        cache_budget(None, taken // 2)
    left = cache_budget(None, taken + (1 << 30))
    assert left is not None and 0 < left < 1 << 31
    assert cache_budget(1 << 20, taken + (1 << 30)) == 1 << 20 and cache_budget(5, None) == 5


@pytest.fixture(scope="module")
def loaded_for_budget(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny_llama(tmp_path_factory.mktemp("budget"), context_length=2048))


def test_a_share_follows_the_replicas_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)))
    share = CoreAllocation(tmp_path / "replicas")
    share.join()
    assert share.num_threads() == 8
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        sharing = tmp_path / "replicas" / f"{other.pid}_{started!r}_0"
        sharing.touch()
        assert share.num_threads() == 4
        sharing.rename(tmp_path / "replicas" / f"{other.pid}_{started!r}_3")
        assert share.num_threads() == 5
        other.kill()
        other.wait()
    assert share.num_threads() == 8
    assert CoreAllocation(tmp_path / "replicas", 2).num_threads() == 2
    share.leave()
    assert list((tmp_path / "replicas").iterdir()) == []


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    with one_thread():
        return load_model(save_tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("kind", ["continuous-batching", "generate"])
def test_an_engine_takes_as_many_threads_as_it_is_given_while_it_runs(
    loaded: LoadedModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = loaded.model.forward

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return forward(*arguments, **named)

    async def generate(engine: Engine, num_threads: int) -> int:
        engine.num_threads = num_threads
        seen.clear()
        async for _ in engine.submit(Generation([5, 6, 7], 6, Sampling(logit_bias=((1, -100.0),)))):
            pass
        return seen[-1]

    async def run() -> None:
        engine = await open_engine(loaded, 4, 1, kind) if kind != "generate" else GenerateEngine(loaded, 2, 1)
        monkeypatch.setattr(loaded.model, "forward", watched)
        assert engine.name == kind
        try:
            assert [await generate(engine, num_threads) for num_threads in (1, 2, 1)] == [1, 2, 1]
        finally:
            await engine.close()

    with one_thread():
        asyncio.run(run())


@pytest.mark.story
def test_a_replica_keeps_within_its_limits_and_tells_what_it_takes(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model", context_length=131072)
    with short_folder() as folder, short_folder() as other:
        long = Running(Path(folder), model, num_threads=None)
        short = Running(Path(other), model, max_model_len=64, max_concurrent=2)
        try:
            told = long.readyz().json()
            assert (told["context_length"], told["max_concurrent"]) == (131072, 32)
            memory = told["memory"]
            assert memory["process_bytes"] < 900 << 20  # 6.2 GB, when all that may be needed was allocated
            assert memory["cache_bytes"] <= 64 << 20
            assert memory["max_cache_bytes"] > 128 << 20
            settles(lambda: long.stats()["engine"]["num_threads"] == max(1, len(os.sched_getaffinity(0)) - 2))

            told = short.readyz().json()
            assert (told["context_length"], told["max_concurrent"], told["num_threads"]) == (64, 2, 1)
            body = {"model": "tiny", "prompt": [5] * 60, "max_tokens": 5}
            refused = short.http.post("/v1/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert short.http.post("/v1/completions", json={**body, "max_tokens": 4}).status_code == 200
        finally:
            assert (long.close(), short.close()) == (0, 0)


def test_a_limit_beyond_what_the_model_was_made_for_is_refused(tmp_path: Path) -> None:
    from jupyter_llmcloud.errors import ModelError

    with pytest.raises(ModelError, match="--max-model-len 512 is more than the model's 256 tokens"):
        load_model(save_tiny_llama(tmp_path), max_model_len=512)
