"""Scores of tokens and pixels: they add up, they find what was planted, and nothing that a prompt holds becomes markup."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jupyter_llmcloud.core.explain.tokens import is_complete, strongest
from jupyter_llmcloud.errors import ModelError, NotFound, UsageError
from jupyter_llmcloud.explanation import arrays, attribution
from jupyter_llmcloud.explanation.attribution import ablation, integrated_gradients
from jupyter_llmcloud.explanation.explaining import explain
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.explanation.texts import explain_generator
from jupyter_llmcloud.magics.understand.results import Explanation
from jupyter_llmcloud.protocol.explanation import Attribution, ExplainedModel, ExplainRequest
from tests.support.tiny_models import (
    byte_level_tokenizer,
    one_thread,
    save_tiny_bert,
    save_tiny_llama,
    save_tiny_vit,
    word_tokenizer,
)

WORDS = ("bad", "fine", "film", "a", "the", "is", "was", "not")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def explained(target: Path, **asked: Any) -> Explanation:
    """What the process would tell."""
    told: list[Any] = []
    explain(ExplainRequest(target=str(target), **asked), told.append)
    model = next(event for event in told if isinstance(event, ExplainedModel))
    return Explanation(model, [event for event in told if isinstance(event, Attribution)])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def sees_good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned one thing: whether the word "good" is in a text."""
    from transformers import AutoModelForSequenceClassification

    labels: dict[str, Any] = {"id2label": {0: "without", 1: "with"}, "label2id": {"without": 0, "with": 1}}
    folder = save_tiny_bert(tmp_path_factory.mktemp("bert") / "model", **labels)
    tokenizer = word_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    draw = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        texts, wanted = zip(*(planted(draw) for _ in range(32)), strict=True)
        loss = model(**tokenizer(list(texts), return_tensors="pt"), labels=torch.tensor(wanted)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2
    model.save_pretrained(folder)
    return folder


def planted(draw: np.random.Generator) -> tuple[str, int]:
    """Seven words, and whether "good" is among them."""
    words = [str(word) for word in draw.choice(WORDS, 7)]
    label = int(draw.integers(2))
    if label:
        words[int(draw.integers(7))] = "good"
    return " ".join(words), label


# --- by values ---


def test_gradients_of_a_linear_model_are_its_weights_times_the_way() -> None:
    weights, given = torch.tensor([[3.0, 0.0, -1.0]]), torch.tensor([[1.0, 5.0, 2.0]])
    baseline = torch.tensor([[0.0, 1.0, 1.0]])
    found = integrated_gradients(lambda rows: (rows * weights).sum(1), given, baseline, 8)
    assert torch.allclose(found.scores, torch.tensor([[3.0, 0.0, -1.0]])) and abs(found.difference) < 1e-5
    alone = ablation(lambda rows: (rows * weights).sum(1), given, baseline, torch.tensor([[0, 1, 2]]))
    assert torch.allclose(alone.scores, found.scores, atol=1e-5) and alone.difference == 0.0


def test_steps_are_added_until_the_scores_add_up() -> None:
    def steep(rows: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(60 * (rows.sum(1) - 0.77))

    found = integrated_gradients(steep, torch.ones(1, 2), torch.zeros(1, 2), 2)
    assert found.steps > 2 and is_complete(found.difference, found.value - found.baseline_value)
    assert found.scores[0, 0].item() == pytest.approx(0.5, abs=0.01)


def test_without_captum_the_extra_that_brings_it_is_named(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'jupyter-llmcloud\[explain\]'"):
        explained(llama, text="a")


# --- models ---


def test_each_token_of_an_answer_has_scores_that_add_up(llama: Path) -> None:
    found = explained(llama, text="The for statement", num_new=3)
    assert (
        "".join(found.tokens) == "The for statement"
        and len(found.answers) == 3
        and len(found.scores) == len(found.tokens)
    )
    for number, answer in enumerate(found.answers):
        assert len(answer.scores) == len(answer.tokens) == len(found.tokens) + number
        assert is_complete(
            sum(answer.scores) - (answer.value - answer.baseline_value), answer.value - answer.baseline_value
        )
        assert 0 < (answer.probability or 0) <= 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("The for statement", return_tensors="pt")
    greedy = model.generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found.answer == tokenizer.decode(greedy)
    with torch.no_grad():
        first = model(**ids).logits[0, -1].log_softmax(-1).max().item()
    assert found.answers[0].value == pytest.approx(first, abs=1e-4)


def test_the_text_that_an_encoder_reads_is_explained_for_each_token_of_the_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    options: dict[str, Any] = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), **sizes, **options)
    T5ForConditionalGeneration(config).eval().save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    found = explained(tmp_path / "t5", text="The for statement", num_new=2, method="ablation")
    assert [len(answer.scores) for answer in found.answers] == [len(found.tokens)] * len(found.answers)
    assert all(any(answer.scores) for answer in found.answers)


def test_a_given_answer_is_explained_in_place_of_the_models_own(llama: Path) -> None:
    found = explained(llama, text="The for", answer=" statement", method="ablation")
    assert found.answer == " statement" and "add up to nothing" in repr(found) and any(found.scores)


def test_the_token_that_was_planted_is_found_by_both_methods(sees_good: Path) -> None:
    draw = np.random.default_rng(1)
    texts = [text for text, label in (planted(draw) for _ in range(24)) if label][:8]
    for method in ("integrated-gradients", "ablation"):
        hits = 0
        for text in texts:
            found = explained(sees_good, text=text, label="with", method=method)
            [best] = strongest(found.scores, 1)
            hits += found.tokens[best] == "good" and found.scores[best] > 0
            assert found.scores[0] == found.scores[-1] == 0.0  # [CLS] and [SEP] are in every text
        assert hits == len(texts)


def test_the_label_that_is_asked_for_is_explained(sees_good: Path) -> None:
    likeliest = explained(sees_good, text="a good film")
    assert likeliest.answer == "with" and likeliest.answers[0].probability > 0.5  # type: ignore[operator]
    other = explained(sees_good, text="a good film", label="without")
    assert other.scores == pytest.approx([-score for score in likeliest.scores], abs=1e-3)  # log-odds of two labels
    with pytest.raises(UsageError, match=r"--label 'wiht' is none of its labels: without, with\. Did you mean with\?"):
        explained(sees_good, text="a good film", label="wiht")


def test_the_quarter_that_decides_is_found_among_the_pixels(tmp_path: Path) -> None:
    folder = save_tiny_vit(tmp_path / "vit", id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1})
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", pixels)
    found = explained(folder, file=str(tmp_path / "image.npy"))
    scores = np.array(found.scores)
    [answer] = found.answers
    assert scores.shape == (16, 16) and is_complete(answer.difference, answer.value - answer.baseline_value)
    assert (
        base64.b64decode(answer.picture).startswith(b"\x89PNG") and 'src="data:image/png;base64,' in found._repr_html_()
    )
    patches = np.array(explained(folder, file=str(tmp_path / "image.npy"), method="ablation").scores)
    assert len(np.unique(patches)) <= 14 * 14


def test_a_module_that_looks_at_one_corner_has_its_scores_there(tmp_path: Path) -> None:
    from jupyter_llmcloud.explanation.arrays import explain_array

    class Corner(torch.nn.Module):
        def forward(self, picture: torch.Tensor) -> torch.Tensor:
            seen = picture[:, 0, :4, :4].sum((1, 2))
            return torch.stack([seen, 1 - seen], dim=1)

    file = tmp_path / "x.npy"
    np.save(file, np.random.default_rng(0).random((1, 12, 12)).astype(np.float32))
    told: list[Any] = []
    explain_array(OpenedModel("corner", "module", Corner()), ExplainRequest(target="", file=str(file)), told.append)
    answer = told[-1]
    scores = np.array(answer.scores).reshape(answer.shape)
    assert np.abs(scores[:4, :4]).min() > 0 and np.abs(scores).sum() == pytest.approx(np.abs(scores[:4, :4]).sum())


def test_an_architecture_of_a_cell_is_explained_by_what_changes_without_each_token() -> None:
    from jupyter_llmcloud.inference.own_models.causal_module import as_generator

    class LastButOne(torch.nn.Module):
        """Says the token before the last one again."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding.from_pretrained(torch.eye(size) * 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(self.embedding(ids)[:, :-1], (0, 0, 1, 0))

    tokenizer = byte_level_tokenizer()
    loaded = as_generator(LastButOne(len(tokenizer)), tokenizer)
    opened = OpenedModel("own", "generator", loaded.model, tokenizer, context_length=64)
    told: list[Any] = []
    explain_generator(opened, ExplainRequest(target="", text="The for while"), told.append)
    answer = told[-1]
    assert told[0].method == "ablation" and len(answer.tokens) > 2 and answer.answer == answer.tokens[-2]
    assert strongest(answer.scores, 9) == [len(answer.tokens) - 2]
    with pytest.raises(UsageError, match="Use --method ablation"):
        explain_generator(
            opened, ExplainRequest(target="", text="The for while", method="integrated-gradients"), told.append
        )


# --- bad input ---


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"text": "a", "label": "x"}, "--label is for classifiers"),
        ({"file": "/nowhere.png"}, "is asked by a text"),
        ({"text": "word " * 300}, "together with what it answers: shorten it"),
        ({"text": "a", "answer": "word " * 300}, "there is room for"),
    ],
)
def test_what_a_generator_cannot_take_is_said(llama: Path, asked: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        explained(llama, **asked)


def test_what_cannot_be_explained_is_refused_by_its_kind(tmp_path: Path, own_root: Path) -> None:
    with pytest.raises(NotFound, match="there is no run 'nobody'"):
        explain(ExplainRequest(target="nobody", text="a"), lambda event: None)
    folder = save_tiny_bert(tmp_path / "tokens", "BertForTokenClassification")
    with pytest.raises(ModelError, match=r"classifies the tokens of texts\. Explained are"):
        explained(folder, text="a")


# --- as it is shown ---


class Tags(HTMLParser):
    """The elements and the attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.sources += [value or "" for name, value in attrs if name == "src"]


def test_what_a_prompt_holds_is_text_in_the_picture_and_beside_it() -> None:
    evil = ['<script>alert("1")</script>', "\"onload='x'", "]]>&amp;", "\x00\u202e\ud83d", "\n", "</text>"]
    model = ExplainedModel(name="<b>m</b>", kind="generator", method="ablation", baseline="<i>")
    answer = Attribution(
        answer="<img src=x onerror=alert(1)>",
        quantity="log-probability of the token",
        value=-1.0,
        baseline_value=-2.0,
        scores=[0.5, -0.2, 0.1, 0.3, 0.0, -0.7],
        tokens=evil,
        num_given=6,
        probability=0.4,
    )
    shown = Explanation(model, [answer])._repr_html_()
    page = Tags()
    page.feed(shown)
    assert set(page.tags) <= {"div", "img", "table", "thead", "tbody", "tr", "th", "td"} and page.tags.count("img") == 1
    [source] = page.sources
    svg = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
    tree = ElementTree.fromstring(svg)  # it is well-formed, whatever the tokens are
    assert {element.tag.rpartition("}")[2] for element in tree.iter()} == {"svg", "rect", "text"}
    assert any('<script>alert("1")</script>' in (element.text or "") for element in tree.iter())


def test_letters_are_dark_on_a_light_ground_of_their_own() -> None:
    from jupyter_llmcloud.magics.understand.pictures import INK, mixed

    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for strength in (-1.0, -0.5, 0.0, 0.5, 1.0):
        assert (light(mixed(strength)) + 0.05) / (light(INK) + 0.05) > 4.5


def test_a_long_answer_is_drawn_in_part_and_kept_whole() -> None:
    model = ExplainedModel(name="m", kind="generator", method="integrated-gradients", baseline="zeros")
    one = Attribution(
        answer="x",
        quantity="q",
        value=1.0,
        baseline_value=0.0,
        scores=[1.0] * 700,
        tokens=["ab"] * 700,
        num_given=700,
        difference=699.0,
    )
    shown = Explanation(model, [one] * 40)
    assert len(shown.answers) == 40 and "The first 12 of 40 tokens are drawn" in shown._repr_html_()
    assert shown.scores[0] == 40.0 and "miss it by" in repr(shown)
    assert len(shown._repr_html_()) < 200_000  # a cell is saved with what it shows


def test_an_array_that_fits_in_no_shape_is_refused_with_what_each_try_has_raised() -> None:
    opened: Any = SimpleNamespace(kind="module", name="mine", model=torch.nn.Linear(3, 1))
    with pytest.raises(UsageError, match=r"shape \[1, 1, 5\]: .*; RuntimeError with an input of shape \[1, 5\]: "):
        arrays._one_row(opened, torch.zeros(1, 5))
    assert arrays._one_row(opened, torch.zeros(3)).shape == (1, 3)
