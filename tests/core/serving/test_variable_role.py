"""Which variable is the model, and which one its tokenizer."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.serving.models.variable_role import CODE, MODEL, TOKENIZER, choose_tokenizer, role_of
from jupyter_llmcloud.errors import UsageError

HERE = "in this notebook"


class Predicts:
    def predict(self, inputs: object) -> object:
        return inputs


class Saves:
    def save_pretrained(self, folder: str) -> None: ...


class Tokenizes(Saves):
    model_input_names = ("input_ids",)


@pytest.mark.parametrize(
    ("value", "role"),
    [(Predicts(), CODE), (len, CODE), (Tokenizes(), TOKENIZER), (Saves(), ""), (3, ""), ([1], ""), (Predicts, "")],
)
def test_a_value_is_told_by_its_class(value: object, role: str) -> None:
    assert role_of(value) == role


def test_the_tokenizer_beside_a_model_is_found() -> None:
    assert choose_tokenizer("model", None, {"model": MODEL, "tok": TOKENIZER}, HERE) == "tok"
    both = {"model": MODEL, "tok": TOKENIZER, "tokenizer": TOKENIZER}
    assert choose_tokenizer("model", None, both, HERE) == "tokenizer"
    assert choose_tokenizer("small", None, {**both, "small_tokenizer": TOKENIZER}, HERE) == "small_tokenizer"
    assert choose_tokenizer("model", "tok", both, HERE) == "tok"
    assert choose_tokenizer("model", None, {"model": MODEL}, HERE) is None


@pytest.mark.parametrize(
    ("given", "hint"), [("model", "model is none"), ("other", "other is not in this notebook"), (None, "a, b")]
)
def test_what_is_no_tokenizer_or_could_be_several_is_said(given: str | None, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        choose_tokenizer("model", given, {"model": MODEL, "a": TOKENIZER, "b": TOKENIZER}, HERE)
