"""Encoder-only models: they embed as sentence-transformers would, and generate nothing."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from jupyter_llmcloud.core.serving.models.model_kind import EMBEDDER
from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.app import Application, ReplicaStatus
from jupyter_llmcloud.inference.kind import kind_of
from jupyter_llmcloud.inference.openai.embedding.answers import embed
from jupyter_llmcloud.inference.openai.embedding.encoders import ServedEncoder, open_encoder
from jupyter_llmcloud.inference.openai.embedding.pooling import pooling_of
from jupyter_llmcloud.inference.openai.responses import encode
from jupyter_llmcloud.protocol.openai.embeddings import MAX_INPUTS, EmbeddingRequest
from jupyter_llmcloud.storage.model_folder import check_folder
from tests.support.tiny_models import save_tiny_bert

TEXTS = ["the film was good", "bad"]


def opened(folder: Path) -> ServedEncoder:
    layout = check_folder(folder, None)
    assert kind_of(layout) == EMBEDDER
    return open_encoder(layout, "tiny", "auto", "cpu")


def with_pooling(folder: Path, **config: Any) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


async def ask(served: ServedEncoder, path: str, **body: Any) -> tuple[int, Any]:
    status = ReplicaStatus("endpoint", "tiny", 8)
    application = Application(status, "the-bearer")
    application.kind, application.encoder, status.state = EMBEDDER, served, "ready"
    headers = {"Authorization": "Bearer the-bearer"}
    async with TestClient(TestServer(application.build())) as client:
        response = await client.post(path, json={"model": "tiny", **body}, headers=headers)
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("kind", "pooling"), [("BertModel", "mean"), ("BertForMaskedLM", "cls"), ("BertForPreTraining", "mean")]
)
async def test_a_text_becomes_the_pooled_states_of_the_encoder(tmp_path: Path, kind: str, pooling: str) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = with_pooling(save_tiny_bert(tmp_path / "m", kind), **{"pooling_mode_cls_token": pooling == "cls"})
    served = opened(folder)
    status, reply = await ask(served, "/v1/embeddings", input=TEXTS, encoding_format="float")
    assert status == 200, reply
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.normalize(pooled, dim=-1).tolist()
    for told, wanted in zip(reply["data"], expected, strict=True):
        assert told["embedding"] == pytest.approx(wanted, abs=1e-5)
    assert reply["usage"]["prompt_tokens"] == int(mask.sum())
    served.close()


async def test_it_tokenizes_and_refuses_to_generate(tmp_path: Path) -> None:
    served = opened(save_tiny_bert(tmp_path / "m", "BertModel"))
    status, reply = await ask(served, "/v1/tokenize", prompt="the film")
    assert (status, reply["count"], reply["max_model_len"]) == (200, 4, 32)
    bodies: dict[str, dict[str, Any]] = {
        "completions": {"prompt": "a"},
        "chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "responses": {"input": "a"},
    }
    for route, body in bodies.items():
        status, reply = await ask(served, f"/v1/{route}", **body)
        assert (status, reply["error"]["code"]) == (400, "not_a_generator")
        assert "/v1/embeddings" in reply["error"]["message"]
    status, reply = await ask(served, "/v1/embeddings", input="good " * 40)
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    served.close()


def test_roberta_has_fewer_positions_than_it_says(tmp_path: Path) -> None:
    import transformers

    from tests.support.tiny_models import word_tokenizer

    tokenizer = word_tokenizer()
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=20, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    served = opened(tmp_path)
    assert served.context_length == 18
    served.embedder.predict([[4] * 18])
    served.close()


@pytest.mark.parametrize("mode", [{"pooling_mode_max_tokens": True}, {"pooling_mode": "weightedmean"},
                                  {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}])  # fmt: skip
def test_a_pooling_that_is_not_known_is_refused(tmp_path: Path, mode: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="pooling"):
        pooling_of(with_pooling(tmp_path, **mode))


def test_a_step_behind_the_pooling_is_refused(tmp_path: Path) -> None:
    steps = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(ModelError, match="'Dense'"):
        pooling_of(tmp_path)


def test_weights_of_the_encoder_that_lack_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny_bert(tmp_path / "m", "BertModel")
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 of the model's weights"):
        opened(folder)


async def test_a_burst_of_single_texts_takes_few_passes_and_gives_the_vectors_that_each_has_alone(
    tmp_path: Path,
) -> None:
    served = opened(save_tiny_bert(tmp_path / "m", "BertModel"))
    prompts = [[2, *range(5, 5 + number % 9), 3] for number in range(64)]
    alone = [served.embedder.predict([prompt])[0] for prompt in prompts]
    before = served.embedder.num_passes
    together = await asyncio.gather(*(served.embedder.embed([prompt]) for prompt in prompts))
    for [vector], wanted in zip(together, alone, strict=True):
        assert vector == pytest.approx(wanted, abs=1e-4)
    # Besides them, the trial of company takes four.
    assert served.embedder.num_passes - before <= 4 + 16
    served.close()


async def test_a_model_that_minds_company_embeds_each_text_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    served = opened(save_tiny_bert(tmp_path / "m", "BertModel"))
    network = served.loaded.model
    forward = network.forward

    def sums_over_texts(*args: Any, **given: Any) -> Any:
        output = forward(*args, **given)
        output.last_hidden_state = output.last_hidden_state + torch.arange(len(given["input_ids"])).view(-1, 1, 1)
        return output

    monkeypatch.setattr(network, "forward", sums_over_texts)
    prompts = [[2, 5, 3], [2, 6, 7, 3]]
    alone = [served.embedder.predict([prompt])[0] for prompt in prompts]
    for vector, wanted in zip(await served.embedder.embed(prompts), alone, strict=True):
        assert vector == pytest.approx(wanted, abs=1e-5)
    served.close()


async def test_texts_that_wait_are_bounded_and_one_too_many_is_told_to_come_again(tmp_path: Path) -> None:
    served = opened(save_tiny_bert(tmp_path / "m", "BertModel"))
    many = [[2, 5, 3]] * MAX_INPUTS
    first, second = (asyncio.create_task(served.embedder.embed(many)) for _ in range(2))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as refused:
        await served.embedder.embed(many)
    assert (refused.value.status, refused.value.code) == (429, "overloaded")
    assert [len(vectors) for vectors in await asyncio.gather(first, second)] == [MAX_INPUTS] * 2
    served.close()


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_many_vectors_are_written_beside_the_event_loop_that_streams_to_others(form: str) -> None:
    vectors = [vector for vector in np.random.default_rng(0).random((MAX_INPUTS, 1024), dtype=np.float32)]

    async def all_of_them(_: Any) -> list[Any]:
        return vectors

    embedder = SimpleNamespace(embed=all_of_them)
    request = EmbeddingRequest(model="m", input=["a"], encoding_format=form)
    before = time.thread_time()
    reply = await embed(SimpleNamespace(embedder=embedder, served_name="m"), request, [[1]] * MAX_INPUTS)  # type: ignore[arg-type]
    whole = encode(reply)
    assert time.thread_time() - before < 0.15  # some 0.5 s of two million numbers, when they are written here
    rows = json.loads(whole)["data"]
    assert [row["index"] for row in rows] == list(range(MAX_INPUTS))
    if form == "float":
        assert rows[7] == {"object": "embedding", "index": 7, "embedding": vectors[7].tolist()}
