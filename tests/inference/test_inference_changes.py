"""A replica takes other weights and adapters while it serves: what goes on goes on, what comes next is answered anew."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.engines import kv_cache, reload
from jupyter_llmcloud.inference.engines.base import Engine, EngineError, EngineStats, Generation
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.engines.slots import engine as slots_engine
from jupyter_llmcloud.inference.engines.with_adapters import EngineWithAdapters, adapters_of
from jupyter_llmcloud.inference.openai.completion import ServedModel
from jupyter_llmcloud.inference.openai.embedding.embedder import Embedder
from jupyter_llmcloud.inference.replica import load_adapters
from tests.inference.test_inference_adapters import trained
from tests.support.tiny_models import one_thread, save_tiny_llama

HEADERS = {"Authorization": "Bearer token"}
PROMPT = "The for statement"
ENGINES = ["slots", "continuous-batching", "generate"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one shape, and one that has another."""
    root = tmp_path_factory.mktemp("models")
    made = {"first": save_tiny_llama(root / "first", seed=0), "second": save_tiny_llama(root / "second", seed=1)}
    made["longer"] = save_tiny_llama(root / "longer", seed=2)
    model = load_model(made["longer"]).model
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(made["longer"])
    return made


async def opened(engine: str, loaded: LoadedModel) -> Engine:
    return await open_engine(loaded, 4, None, engine)


@asynccontextmanager
async def replica(engine: str, folder: Path) -> AsyncIterator[TestClient[Any, Any]]:
    """A replica that serves a model."""
    loaded = load_model(folder)
    application = Application(ReplicaStatus("tiny", "tiny", 4, state="ready"), "token")
    application.model = ServedModel(loaded, await opened(engine, loaded), "tiny")
    async with TestClient(TestServer(application.build()), headers=HEADERS) as client:
        yield client
    await application.model.close()


def expected(model: Any, tokenizer: Any, num_tokens: int = 8) -> str:
    """What the plain model says, token after token."""
    tokens = tokenizer(PROMPT)["input_ids"]
    number = len(tokens)
    with torch.inference_mode():
        for _ in range(num_tokens):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return str(tokenizer.decode(tokens[number:]))


async def ask(client: TestClient[Any, Any], model: str = "tiny", status: int = 200, **body: Any) -> Any:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **body}
    async with client.post("/v1/completions", json=body) as answer:
        told = await answer.json()
        assert answer.status == status, told
        if status == 200:
            assert told["model"] == ("tiny" if model == "tiny" else f"tiny:{model.removeprefix('tiny:')}")
        return told["choices"][0]["text"] if status == 200 else told["error"]["message"]


async def change(client: TestClient[Any, Any], path: str, status: int = 200, **body: Any) -> Any:
    async with client.post(path, json=body) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


@pytest.mark.parametrize("engine", ENGINES)
async def test_other_weights_answer_every_request_after_the_change(engine: str, folders: dict[str, Path]) -> None:
    async with replica(engine, folders["first"]) as client:
        first, second = (load_model(folders[name]) for name in ("first", "second"))
        assert await ask(client) == expected(first.model, first.tokenizer)
        await change(client, "/reload", model=str(folders["second"]), revision=2)
        assert await ask(client) == expected(second.model, second.tokenizer)
        assert expected(first.model, first.tokenizer) != expected(second.model, second.tokenizer)


@pytest.mark.parametrize("engine", ENGINES)
async def test_streams_that_are_open_go_on_to_their_end(engine: str, folders: dict[str, Path]) -> None:
    async with replica(engine, folders["first"]) as client:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 120, "temperature": 0, "stream": True, "stop": "\0"}
        async with client.post("/v1/completions", json=body) as answer:
            await answer.content.readline()
            await change(client, "/reload", model=str(folders["second"]))
            rest = await answer.content.read()
        assert rest.endswith(b"data: [DONE]\n\n") and b"error" not in rest
        second = load_model(folders["second"])
        assert await ask(client) == expected(second.model, second.tokenizer)


@pytest.mark.parametrize("engine", ENGINES)
async def test_weights_of_another_shape_or_none_change_nothing(
    engine: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    async with replica(engine, folders["first"]) as client:
        before = await ask(client)
        told = await change(client, "/reload", 409, model=str(folders["longer"]))
        assert "shape" in told["error"]["message"]
        await change(client, "/reload", 409, model=str(tmp_path))
        await change(client, "/reload", 400, folder="x")
        assert await ask(client) == before


@pytest.mark.parametrize("engine", ENGINES)
async def test_an_adapter_answers_under_its_name_and_the_model_as_before(
    engine: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    async with replica(engine, folders["first"]) as client:
        adapted = trained(folders["first"], tmp_path / "legal")
        first = load_model(folders["first"])
        plain, legal = expected(first.model, first.tokenizer), expected(adapted, first.tokenizer)
        assert plain != legal
        assert (await change(client, "/adapters", name="legal", folder=str(tmp_path / "legal")))["adapters"] == [
            "legal"
        ]
        answers = await asyncio.gather(ask(client), ask(client, "tiny:legal"), ask(client, "legal"), ask(client))
        assert answers == [plain, legal, legal, plain]
        assert "'tiny:other' does not exist" in await ask(client, "tiny:other", 404)
        await change(client, "/adapters", name="legal")
        assert "does not exist" in await ask(client, "tiny:legal", 404)
        assert await ask(client) == plain


@pytest.mark.parametrize("engine", ENGINES)
async def test_what_an_adapter_answers_goes_on_to_its_end_when_it_is_replaced_or_removed(
    engine: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    async with replica(engine, folders["first"]) as client:
        legal = {"name": "legal", "folder": str(tmp_path / "legal")}
        trained(folders["first"], tmp_path / "legal")
        body = {"model": "legal", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        await change(client, "/adapters", **legal)
        async with client.post("/v1/completions", json=body) as answer:
            whole = (await answer.json())["choices"][0]["text"]
        for what in (legal, {"name": "legal"}):
            async with client.post("/v1/completions", json={**body, "stream": True}) as answer:
                begins = await answer.content.readline()
                await change(client, "/adapters", **what)
                lines = (begins + await answer.content.read()).decode().split("\n\n")
            assert lines[-2:] == ["data: [DONE]", ""], lines[-2]
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
            assert "".join(event["choices"][0]["text"] for event in events) == whole
        assert "does not exist" in await ask(client, "legal", 404)


async def test_an_adapter_of_the_endpoint_that_does_not_fit_is_told_with_its_reason_until_one_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    trained(folders["first"], tmp_path / "legal")
    whole = save_tiny_llama(tmp_path / "whole")
    loaded = load_model(folders["first"])
    model = ServedModel(loaded, await opened("generate", loaded), "tiny")
    await load_adapters(model, {"legal": str(whole), "plain": str(tmp_path / "legal")})
    told = adapters_of(model).refused
    assert told.keys() == {"legal"} and "whole model" in told["legal"]
    with pytest.raises(ApiError, match=r"'legal' does not go with the model that is served now: .* whole model"):
        model.adapter_of("tiny:legal")
    assert model.adapter_of("plain") == "plain"
    await adapters_of(model).load("legal", str(tmp_path / "legal"))
    assert told == {} and model.adapter_of("tiny:legal") == "legal"
    await model.close()


@pytest.mark.parametrize("engine", ENGINES)
async def test_what_is_no_adapter_of_this_model_is_refused_and_changes_nothing(
    engine: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    async with replica(engine, folders["first"]) as client:
        other = save_tiny_llama(tmp_path / "wide", seed=3, tie_word_embeddings=True)
        assert "whole model" in str(await change(client, "/adapters", 409, name="x", folder=str(other)))
        await change(client, "/adapters", 409, name="x", folder=str(tmp_path / "nothing"))
        first = load_model(folders["first"])
        assert await ask(client) == expected(first.model, first.tokenizer)


async def test_an_adapter_of_another_architecture_is_refused_with_its_reason_and_keeps_no_other_from_being_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    trained(folders["first"], tmp_path / "plain")
    trained(folders["first"], tmp_path / "other", target_modules=["q_proj"])
    file = tmp_path / "other" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["c_attn"]}))
    async with replica("generate", folders["first"]) as client:
        told = await change(client, "/adapters", 409, name="x", folder=str(tmp_path / "other"))
        assert "c_attn" in told["error"]["message"]
    loaded = load_model(folders["first"])
    model = ServedModel(loaded, await opened("generate", loaded), "tiny")
    await load_adapters(model, {"other": str(tmp_path / "other"), "plain": str(tmp_path / "plain")})
    assert adapters_of(model).names == ["plain"] and "c_attn" in adapters_of(model).refused["other"]
    await model.close()


async def test_nothing_is_embedded_with_half_of_the_new_weights(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, may_end = threading.Event(), threading.Event()
    ran = Embedder._pass

    def slowly(self: Embedder, prompts: list[list[int]]) -> torch.Tensor:
        found = ran(self, prompts)
        inside.set()
        assert may_end.wait(30)
        inside.clear()
        return found

    copied: list[bool] = []
    monkeypatch.setattr(Embedder, "_pass", slowly)
    monkeypatch.setattr(reload, "_copy", lambda model, state: copied.append(inside.is_set()))

    async with replica("slots", folders["first"]) as client:
        embedding = asyncio.create_task(client.post("/v1/embeddings", json={"model": "tiny", "input": PROMPT}))
        await asyncio.to_thread(inside.wait, 30)
        changing = asyncio.create_task(change(client, "/reload", model=str(folders["second"])))
        await asyncio.wait([changing], timeout=2)
        may_end.set()
        await changing
        assert (await embedding).status == 200
        assert copied == [False]
        async with client.post("/v1/embeddings", json={"model": "tiny", "input": PROMPT}) as answer:
            assert answer.status == 200  # and what comes next is


async def test_what_is_embedded_for_the_first_time_waits_for_the_new_weights_too(folders: dict[str, Path]) -> None:
    loaded = load_model(folders["first"])
    model = ServedModel(loaded, await opened("generate", loaded), "tiny")
    async with model.still():
        first = asyncio.ensure_future(model.embedder.embed([[2, 3, 4]]))
        await asyncio.wait([first], timeout=1)
        assert not first.done()
    assert len(await first) == 1
    await model.close()


async def test_an_engine_that_could_not_take_weights_whole_answers_no_more(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = asyncio.Event()
    loaded = load_model(folders["first"])
    engine = await opened("slots", loaded)
    engine.on_failure = failed.set
    monkeypatch.setattr(slots_engine, "ForwardPass", _without_memory)
    with pytest.raises(MemoryError):
        await reload.take_weights(loaded, engine, str(folders["second"]))
    await asyncio.wait_for(failed.wait(), 30)
    assert "MemoryError" in str(engine.failure)
    with pytest.raises(EngineError):
        engine.submit(Generation([1, 2], 1))
    await engine.close()


def _without_memory(loaded: LoadedModel) -> Any:
    raise MemoryError


async def test_all_engines_beside_each_other_are_promised_no_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each could grow to the same share of it, so that three took more than there was."""
    monkeypatch.setattr(kv_cache, "free_memory", lambda device: 1000)

    @dataclass
    class Loaded:
        model: Any
        cache_bytes: int | None = None

    class Promised:
        name, context_length, num_parallel, num_threads, failure, on_failure = "slots", 8, 1, 1, None, None

        def __init__(self, most: int) -> None:
            self.most = most

        def stats(self) -> EngineStats:
            return EngineStats(0, 0, max_cache_bytes=self.most)

    async def opened_beside(adapted: Any, *_: Any) -> Any:
        return Promised(adapted.cache_bytes)

    model = Loaded(SimpleNamespace(device=torch.device("cpu")))
    engine = EngineWithAdapters(model, Promised(400), opened_beside)  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "_attach", lambda folder: model)
    for name in "abc":
        await engine.load(name, name)
    assert [one.most for one in engine._adapted.values()] == [240, 144, 86]  # type: ignore[attr-defined]
