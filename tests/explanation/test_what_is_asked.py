"""What a model is asked when it is explained or tried, by values: no model is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.explanation.texts import _prompt
from jupyter_llmcloud.explanation.tried_rows import label_numbers
from jupyter_llmcloud.inference.open_inference.classifiers.scores import Labels

START, END = 1, 2


class _Tokenizer:
    """A token for each letter, between a start and an end, as with `add_eos_token`."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [START, *ids, END] if add_special_tokens else ids}


@pytest.mark.parametrize(("is_encoder_decoder", "ids"), [(False, [START, 97, 98]), (True, [START, 97, 98, END])])
def test_a_text_is_gone_on_from_as_its_endpoint_does(is_encoder_decoder: bool, ids: list[int]) -> None:
    opened = OpenedModel("m", "generator", None, _Tokenizer(), is_encoder_decoder=is_encoder_decoder)
    assert _prompt(opened, "ab") == ids


STARS = Labels(("1", "2", "3", "4", "5"), "single_label_classification")


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ([1, 5, 3], [0, 4, 2]),
        (["1", "5", "3"], [0, 4, 2]),
        ([0, 4, 2], [0, 4, 2]),
        ([0, 1], [0, 1]),
    ],
    ids=["stars", "texts", "numbers", "first-numbers"],
)
def test_labels_that_are_called_by_numbers_are_taken_by_their_names(given: list[Any], numbers: list[int]) -> None:
    assert label_numbers([{"label": label} for label in given], STARS, "data") == numbers


def test_a_label_that_is_neither_a_name_nor_a_number_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="the label 6 is none of the model's"):
        label_numbers([{"label": label} for label in (0, 6)], STARS, "data")
