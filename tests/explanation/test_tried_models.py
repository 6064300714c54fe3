"""Models asked inputs that are changed: what was planted is found, the rest is left alone, bad data is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

from jupyter_llmcloud.client.model_work.inputs import data_file, texts_of
from jupyter_llmcloud.core.explain.robustness import OutsideInputs, TriedInputs
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.arrays import pixel_values
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.explanation.tried_arrays import _range, try_arrays
from jupyter_llmcloud.explanation.tried_generators import cut
from jupyter_llmcloud.explanation.tried_rows import spread
from jupyter_llmcloud.explanation.trying import try_model
from jupyter_llmcloud.magics.understand.results import Robustness
from jupyter_llmcloud.protocol.explanation import TriedChange, TriedModel, TryRequest
from tests.support.tiny_models import TEXT, one_thread, save_tiny_bert, save_tiny_llama, save_tiny_vit


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def result(told: list[Any]) -> Robustness:
    """What the notebook makes of it."""
    rows = [event for event in told if isinstance(event, TriedChange)]
    model = next(event for event in told if isinstance(event, TriedModel))
    changes = [TriedInputs(**event.row) for event in rows if not event.is_outside]
    return Robustness(model, changes, [OutsideInputs(**event.row) for event in rows if event.is_outside])


def tried(target: Path, data: Any, tmp_path: Path, **asked: Any) -> Robustness:
    rows, told_of = data_file(data, tmp_path)
    told: list[Any] = []
    try_model(TryRequest(target=str(target), rows=rows, told=told_of, **asked), told.append)
    return result(told)


def test_a_classifier_of_words_is_lost_with_capitals_and_not_without(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_tiny_bert(tmp_path / "bert", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(["good", "bad", "fine", "film", "a", "was"], 6)) for _ in range(60)]
    with torch.no_grad():
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    found = tried(
        folder, [{"text": t, "label": ("no", "yes")[a]} for t, a in zip(texts, answers, strict=True)], tmp_path
    )
    by_name = {row.change: row for row in found.changes}
    assert by_name["as they are"].num_right == 60  # its own answers are the labels
    assert by_name["no capitals"].num_other == 0  # there are none
    assert by_name["capitals"].num_lost > 6  # every word is unknown
    assert by_name["the worst of them for each row"].num_right <= by_name["capitals"].num_right  # type: ignore[operator]
    shown = repr(found)
    assert "60 texts of the data given; changes by seed 0" in shown and "the same answers" in shown
    assert "loses" in shown and "letters in any order" in shown and "<table>" in found._repr_html_()
    again = tried(folder, list(zip(texts, answers, strict=True)), tmp_path)
    assert again.changes == found.changes  # by the same seed, and labels as numbers


def test_data_without_labels_are_compared_with_the_answers_to_them(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    found = tried(folder, ["a good film", "the film was bad"] * 5, tmp_path, num_rows=6)
    assert found.changes[0].num_rows == 6 and all(row.num_right is None for row in found.changes)
    assert "whose labels nobody has told" in repr(found) and found.table.headings == [
        "rows",
        "other answers",
        "verdict",
    ]


def test_a_generator_is_asked_for_the_half_that_stays_as_it_is(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "llama")
    found = tried(folder, TEXT * 4, tmp_path)
    assert {row.num_rows for row in found.changes} == {16}
    assert all(row.perplexity is not None and row.perplexity > 1 for row in found.changes)
    first, *others = found.changes
    assert first.num_worse == first.num_better == 0
    assert all(row.num_worse + row.num_better > 0 for row in others if "typos" in row.change)
    data, *outside = found.outside
    assert data.bits_per_byte and len(outside) == 2 and all(row.bits_per_byte for row in outside)
    assert "the second half, as it is, of 16 texts" in repr(found)
    assert cut("The for statement is used") == ("The for", " statement is used") and cut("short") is None


def test_signs_that_mislead_do_more_than_random_ones(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        """Two classes by a weighted mean that single pixels hardly change."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, picture: torch.Tensor) -> torch.Tensor:
            seen = (picture * self.weight).sum((1, 2, 3))
            return torch.stack([seen, -seen], dim=1)

    module = Mean()
    inputs = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = module(inputs).argmax(1)
    rows, told_of = data_file((inputs.numpy(), labels.numpy()), tmp_path)
    told: list[Any] = []
    try_arrays(OpenedModel("mean", "module", module), TryRequest(target="", rows=rows, told=told_of), told.append)
    found = result(told)
    right = {row.change: row.num_right for row in found.changes}
    assert right["as they are"] == 80
    assert right["misleading signs (FGSM), 8/255"] < right["random signs, 8/255"] - 10  # type: ignore[operator]
    assert right["misleading signs (FGSM), 2/255"] >= right["misleading signs (FGSM), 8/255"]  # type: ignore[operator]


def test_a_folder_of_images_is_a_class_for_each_folder(tmp_path: Path) -> None:
    from PIL import Image

    folder = save_tiny_vit(tmp_path / "vit", id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1})
    draw = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    found = tried(folder, tmp_path / "images", tmp_path)
    assert found.changes[0].num_rows == 8 and found.changes[0].num_right is not None
    assert "8 inputs of images" in repr(found)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "the data are a list of texts"),
        ([3], "there is a row 3"),
        ([{"body": "x"}], "there is a row"),
        (pandas.DataFrame({"review": ["x"], "stars": [1]}), "this has the columns review, stars"),
        ((np.zeros((3, 2)), np.zeros(2)), r"there are 3 inputs, and labels of shape \[2\]"),
        ("nowhere.jsonl", "is neither a file, a folder nor, in a notebook, a variable"),
    ],
)
def test_data_of_another_shape_are_named(data: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        data_file(data, tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        pandas.DataFrame({"text": ["one", "two"], "label": [0, 1], "source": ["a", "b"]}),
        (pandas.Series(["one", "two"]), np.array([0, 1])),
        (["one", "two"], [0, 1]),
    ],
    ids=["table", "columns", "lists"],
)
def test_rows_are_taken_from_tables_and_columns(data: Any, tmp_path: Path) -> None:
    rows = json.loads(Path(data_file(data, tmp_path)[0]).read_text())
    assert rows == [{"text": "one", "label": 0}, {"text": "two", "label": 1}]


def test_a_column_of_texts_is_a_list_and_a_table_of_numbers_an_array(tmp_path: Path) -> None:
    assert texts_of(pandas.Series(["a", "b"]), "--outside") == ["a", "b"]
    assert json.loads(Path(data_file(np.array(["a", "b"]), tmp_path)[0]).read_text())[1]["text"] == "b"
    inputs = np.load(data_file(pandas.DataFrame({"width": [1.0, 2.0], "text_length": [3, 4]}), tmp_path)[0])["inputs"]
    assert inputs.tolist() == [[1, 3], [2, 4]]


def test_rows_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": "x"}\n\n{"text": "two", "label": 1}\n')
    path, told = data_file(tmp_path / "a.jsonl", tmp_path)
    assert told == "a.jsonl" and json.loads(Path(path).read_text())[1] == {"text": "two", "label": 1}
    (tmp_path / "a.txt").write_text("line\n" * 400)
    rows = json.loads(Path(data_file(tmp_path / "a.txt", tmp_path)[0]).read_text())
    assert len(rows) == 4 and "".join(row["text"] for row in rows) == "line\n" * 400
    assert texts_of("a", "--outside") == ["a"] and spread(range(10), 3) == [0, 3, 6]
    with pytest.raises(UsageError, match="--outside is a text, a list of texts or a file, not int"):
        texts_of(3, "--outside")


def test_a_label_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    with pytest.raises(UsageError, match="the label 'maybe' is none of the model's: no, yes"):
        tried(folder, [("a film", "maybe")], tmp_path)


def test_an_image_goes_from_what_its_processor_makes_of_black_to_what_it_makes_of_white() -> None:
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

    processor = EfficientNetImageProcessorPil(size={"height": 16, "width": 16}, rescale_offset=True)
    opened = OpenedModel("m", "image-classifier", None, processor=processor)
    grey = pixel_values(opened, np.full((16, 16, 3), 128, dtype=np.uint8))
    black, white = (pixel_values(opened, np.full((16, 16, 3), level, dtype=np.uint8)) for level in (0, 255))
    low, high = _range(opened, grey)
    assert low.shape == high.shape == (1, 3, 1, 1)
    torch.testing.assert_close(low.expand_as(black), black)
    torch.testing.assert_close(high.expand_as(white), white)
