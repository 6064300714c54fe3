"""Classifiers of transformers behind the Open Inference Protocol: what they say is what the model says alone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.open_inference.classifiers.text import TextClassifier, TextRow
from tests.support.predictions import Replica, folder_spec, serve
from tests.support.tiny_models import one_thread, save_tiny_bert, save_tiny_vit, word_tokenizer

TEXTS = ["good", "the film was not bad", "a good film is a good film", "fine fine fine"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {"id2label": {0: "bad", 1: "mixed", 2: "good"}, "label2id": {"bad": 0, "mixed": 1, "good": 2}}
    return save_tiny_bert(tmp_path_factory.mktemp("classifier"), **labels)


def alone(folder: Path, texts: list[str], auto: str = "AutoModelForSequenceClassification") -> list[Any]:
    """The logits of each text, by transformers."""
    import torch
    import transformers

    model = getattr(transformers, auto).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts]


def test_texts_get_logits_scores_and_labels(classifier: Path) -> None:
    wanted = np.stack(alone(classifier, TEXTS))

    async def asks(replica: Replica) -> None:
        told = await replica.outputs(("text", "BYTES", TEXTS))
        shape, logits = told["logits"]
        assert shape == [4, 3]
        np.testing.assert_allclose(np.reshape(logits, shape), wanted, rtol=1e-4, atol=1e-5)
        probabilities = np.exp(wanted) / np.exp(wanted).sum(-1, keepdims=True)
        np.testing.assert_allclose(np.reshape(told["scores"][1], shape), probabilities, rtol=1e-4)
        names = ["bad", "mixed", "good"]
        assert told["labels"] == ([4], [names[best] for best in wanted.argmax(-1)])
        rows = (await replica.infer({"inputs": TEXTS}))["outputs"]
        assert [row["label"] for row in rows] == told["labels"][1]
        one = (await replica.infer({"inputs": TEXTS[1]}))["outputs"]
        np.testing.assert_allclose(one["logits"], wanted[1], rtol=1e-4, atol=1e-5)
        assert one["score"] == max(one["scores"].values())
        metadata = await (await replica.client.get("/v2/models/it")).json()
        assert metadata["platform"] == "transformers" and metadata["versions"] == ["1"]
        assert metadata["parameters"]["labels"] == names

    serve(folder_spec(classifier), asks)


def test_many_at_once_share_batches_and_get_what_each_gets_alone(classifier: Path) -> None:
    texts = TEXTS * 8
    wanted = alone(classifier, TEXTS) * 8

    async def asks(replica: Replica) -> None:
        assert replica.served.predictor.details["pads"] is True
        answers = await asyncio.gather(*(replica.infer({"inputs": text}) for text in texts))
        for answer, logits in zip(answers, wanted, strict=True):
            np.testing.assert_allclose(answer["outputs"]["logits"], logits, rtol=1e-4, atol=1e-5)
        assert replica.served.batcher.num_batches < len(texts) / 2

    serve(folder_spec(classifier, max_rows=8), asks)


def test_token_ids_may_be_sent_and_are_checked(classifier: Path) -> None:
    wanted = alone(classifier, ["good film"])[0]

    async def asks(replica: Replica) -> None:
        ids = [[2, 4, 7, 3]]
        told = await replica.outputs(("input_ids", "INT64", ids))
        np.testing.assert_allclose(told["logits"][1], wanted, rtol=1e-4, atol=1e-5)
        padded = await replica.outputs(
            ("input_ids", "INT64", [[2, 4, 7, 3, 0, 0]]), ("attention_mask", "INT64", [[1, 1, 1, 1, 0, 0]])
        )
        np.testing.assert_allclose(padded["logits"][1], wanted, rtol=1e-4, atol=1e-5)
        for name, datatype, data, words in (
            ("input_ids", "INT64", [[2, 999]], "input_ids holds 999: the model knows the ids 0 to 12"),
            ("input_ids", "FP32", [[2.0]], "must be INT64"),
            ("input_ids", "INT64", [2, 3], "the shape [rows, tokens]"),
            ("input_ids", "INT64", [[2] * 40], "has 40 tokens in a row: the model takes 32"),
            ("text", "INT64", [1], "must be BYTES"),
            ("text", "BYTES", [], "at least [1]"),
        ):
            body = {"inputs": [{"name": name, "shape": list(np.shape(data)), "datatype": datatype, "data": data}]}
            assert words in (await replica.infer(body, 400))["error"]

    serve(folder_spec(classifier), asks)


def test_a_text_that_is_too_long_fails_alone_unless_it_may_be_cut_off(classifier: Path) -> None:
    async def asks(replica: Replica) -> None:
        long = "good " * 50
        bad, fine = await asyncio.gather(replica.infer({"inputs": long}, 400), replica.infer({"inputs": "good"}))
        assert "has 52 tokens, and the model takes 32" in bad["error"] and fine["outputs"]["label"]
        cut = await replica.infer({"inputs": long, "parameters": {"truncation": True}})
        assert cut["outputs"]["label"]
        huge = await replica.infer({"inputs": "good " * 100_000}, 400)  # of which only the beginning is read
        assert "has at least" in huge["error"] and "the model takes 32" in huge["error"]

    serve(folder_spec(classifier), asks)


def test_a_regressor_tells_numbers(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "m", num_labels=1, problem_type="regression")
    wanted = alone(folder, TEXTS)

    async def asks(replica: Replica) -> None:
        told = await replica.outputs(("text", "BYTES", TEXTS))
        assert set(told) == {"logits", "scores"} and told["scores"] == told["logits"]
        np.testing.assert_allclose(told["scores"][1], np.ravel(wanted), rtol=1e-4, atol=1e-5)
        answer = await replica.infer({"inputs": TEXTS[0]})
        np.testing.assert_allclose(answer["outputs"]["value"], wanted[0][0], rtol=1e-4)

    spec = folder_spec(folder)
    assert spec.kind == "regressor"
    serve(spec, asks)


def test_several_labels_may_hold(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "m", num_labels=3, problem_type="multi_label_classification")
    [logits] = alone(folder, ["good"])

    async def asks(replica: Replica) -> None:
        told = await replica.outputs(("text", "BYTES", ["good"]))
        np.testing.assert_allclose(told["scores"][1], 1 / (1 + np.exp(-logits)), rtol=1e-4)
        held = [f"LABEL_{index}" for index in range(3) if logits[index] >= 0]
        assert json.loads(told["labels"][1][0]) == held

    serve(folder_spec(folder), asks)


def test_tokens_get_labels_of_their_own(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "m", "BertForTokenClassification", num_labels=3)
    wanted = alone(folder, TEXTS, "AutoModelForTokenClassification")

    async def asks(replica: Replica) -> None:
        told = await replica.outputs(("text", "BYTES", TEXTS))
        shape, logits = told["logits"]
        assert shape == [4, 9, 3]
        mask = np.reshape(told["attention_mask"][1], (4, 9))
        for row, one in enumerate(wanted):
            assert mask[row].sum() == len(one)
            np.testing.assert_allclose(np.reshape(logits, shape)[row, : len(one)], one, rtol=1e-4, atol=1e-5)
        [tokens] = (await replica.infer({"inputs": ["a good film"]}))["outputs"]
        assert [(row["token"], row["start"], row["end"]) for row in tokens] == [
            ("a", 0, 1), ("good", 2, 6), ("film", 7, 11),
        ]  # fmt: skip

    serve(folder_spec(folder), asks)


def test_images_come_as_files_pixels_or_values(tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, ViTForImageClassification

    folder = save_tiny_vit(tmp_path / "m", num_labels=3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    values = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = ViTForImageClassification.from_pretrained(folder).eval()(values).logits[0].numpy()
    file = io.BytesIO()
    image.save(file, "PNG")

    async def asks(replica: Replica) -> None:
        text = base64.b64encode(file.getvalue()).decode()
        answer = (await replica.infer({"inputs": [text, f"data:image/png;base64,{text}"]}))["outputs"]
        for row in answer:
            np.testing.assert_allclose(row["logits"], wanted, rtol=1e-3, atol=1e-4)
        pixels = await replica.outputs(("image", "UINT8", np.asarray(image)[None].tolist()))
        np.testing.assert_allclose(pixels["logits"][1], wanted, rtol=1e-3, atol=1e-4)
        sent = await replica.outputs(("pixel_values", "FP32", values.tolist()))
        np.testing.assert_allclose(sent["logits"][1], wanted, rtol=1e-3, atol=1e-4)
        bad = base64.b64encode(b"no image").decode()
        assert "cannot be read" in (await replica.infer({"inputs": bad}, 400))["error"]
        wrong = {"inputs": [{"name": "pixel_values", "shape": [1, 3, 5, 5], "datatype": "FP32", "data": [0.5] * 75}]}
        assert "takes no pixel_values of shape [3, 5, 5]" in (await replica.infer(wrong, 400))["error"]

    serve(folder_spec(folder), asks)


def test_rows_that_padding_would_change_share_a_batch_with_their_likes_only(classifier: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    forward = model.forward
    model.forward = lambda attention_mask=None, **inputs: forward(**inputs)  # it sees padding
    predictor = TextClassifier(model, AutoTokenizer.from_pretrained(classifier), "classifier", 8)
    assert predictor.pads is False and predictor.max_rows == 8
    rows = [predictor.rows(_asked(text))[0] for text in TEXTS]
    for text_result, wanted in zip(predictor.predict(rows), alone(classifier, TEXTS), strict=True):
        np.testing.assert_allclose(text_result[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_mixes_its_batch_gets_one_row_at_a_time(classifier: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    forward = model.forward

    def mixed(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits - output.logits.mean(0, keepdim=True)
        return output

    model.forward = mixed
    predictor = TextClassifier(model, AutoTokenizer.from_pretrained(classifier), "classifier", 8)
    assert predictor.max_rows == 1


def _asked(text: str) -> Any:
    from jupyter_llmcloud.inference.open_inference.messages import parse

    return parse(json.dumps({"inputs": text}).encode())


def test_no_generator_is_asked_for_text(classifier: Path) -> None:
    async def asks(replica: Replica) -> None:
        async with replica.client.post("/v1/completions", json={"model": "it", "prompt": "x"}) as response:
            error = (await response.json())["error"]
            assert response.status == 400 and error["code"] == "not_a_generator"
            assert "POST /llmcloud/v2/models/it/infer" in error["message"]

    serve(folder_spec(classifier), asks)


def test_a_classifier_whose_head_is_missing_is_not_served(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "m", "BertModel")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ModelError, match=r"lacks .* of the model's weights"):
        serve(folder_spec(folder), lambda replica: asyncio.sleep(0))


def test_an_adapter_for_classification_is_served_with_its_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import BertForSequenceClassification

    base = save_tiny_bert(tmp_path / "base", "BertModel")
    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = adapted(input_ids=torch.tensor([[2, 4, 7, 3]])).logits[0].numpy()

    async def asks(replica: Replica) -> None:
        told = await replica.outputs(("input_ids", "INT64", [[2, 4, 7, 3]]))
        np.testing.assert_allclose(told["logits"][1], wanted, rtol=1e-3, atol=1e-4)

    spec = folder_spec(tmp_path / "adapter")
    assert spec.kind == "classifier"
    serve(spec, asks)


def test_a_picture_that_a_camera_took_upright_is_seen_upright(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = save_tiny_vit(tmp_path / "m")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    lying = Image.fromarray(np.rot90(pixels))
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    file = io.BytesIO()
    lying.save(file, "PNG", exif=exif)
    processor = ViTImageProcessorPil.from_pretrained(folder)
    given = processor(images=Image.fromarray(pixels), return_tensors="pt")
    wanted = AutoModelForImageClassification.from_pretrained(folder).eval()(**given).logits[0].tolist()

    async def asks(replica: Replica) -> None:
        told = await replica.infer({"inputs": base64.b64encode(file.getvalue()).decode()})
        np.testing.assert_allclose(told["outputs"]["logits"], wanted, rtol=1e-4, atol=1e-5)

    serve(folder_spec(folder), asks)


def test_a_number_that_is_predicted_of_a_picture_is_no_choice_of_one(tmp_path: Path) -> None:
    folder = save_tiny_vit(tmp_path / "m", num_labels=1)
    values = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)

    async def asks(replica: Replica) -> None:
        told = await replica.outputs(("pixel_values", "FP32", values.tolist()))
        assert set(told) == {"logits", "scores"} and told["scores"] == told["logits"]

    serve(folder_spec(folder), asks)


def test_a_text_may_have_as_many_tokens_as_there_are_positions_behind_the_padding(tmp_path: Path) -> None:
    import transformers

    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 1 << 30
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, pad_token_id=0, num_labels=3, type_vocab_size=2,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config).eval()
    predictor = TextClassifier(model, tokenizer, "classifier", 4)
    assert predictor.details["context_length"] == 19
    [found] = predictor.predict([TextRow("good " * 30, None, True)])
    assert len(found[0]) == 3
