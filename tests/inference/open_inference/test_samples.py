"""The example that is shown of a request to a module: one that its forward takes, or a word for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from jupyter_llmcloud.inference.open_inference.messages import InferRequest
from jupyter_llmcloud.inference.open_inference.modules import ModulePredictor
from jupyter_llmcloud.inference.open_inference.predictor import PredictionFailed
from jupyter_llmcloud.inference.open_inference.samples import PLACEHOLDER, sample_of
from jupyter_llmcloud.inference.open_inference.tensors import InvalidInput


class Tags(nn.Module):
    """Ids in, scores out, by a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(9, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(self.embed(ids))[0])


class Two(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right


class Chooses(nn.Module):
    """What it does depends on the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), (1, 5)),
        (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).to(torch.bfloat16), (1, 3)),
        (nn.GRU(4, 2), (1, 4, 4)),
        (nn.TransformerEncoderLayer(16, 2, 16), (1, 16)),
        (Tags(), (1, 4)),
    ],
    ids=["flat", "bf16", "recurrent", "encoder", "ids"],
)
def test_a_module_takes_the_sample_that_it_is_shown_with(module: nn.Module, shape: tuple[int, ...]) -> None:
    predictor = ModulePredictor(module, 1)
    value = json.loads(predictor.details["inputs"])
    assert torch.tensor(value).shape == shape
    [result] = predictor.predict(predictor.rows(InferRequest(value=value)))
    assert not isinstance(result, PredictionFailed), result


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)), f"{PLACEHOLDER}, OF SHAPE 1 x 3 x 28 x 28"),
        (Chooses(), PLACEHOLDER),
        (Two(), {"left": PLACEHOLDER, "right": PLACEHOLDER}),
    ],
    ids=["a picture", "by values", "two"],
)  # fmt: skip
def test_what_is_too_large_or_not_known_is_a_word_that_is_refused_as_one(module: nn.Module, text: Any) -> None:
    predictor = ModulePredictor(module, 1)
    assert json.loads(predictor.details["inputs"]) == text
    with pytest.raises(InvalidInput, match="inputs must be numbers in lists"):
        predictor.rows(InferRequest(value=text))


def test_a_sample_costs_no_memory_and_leaves_the_module_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert sample_of(module, ["input"]) == "[[0.0, 0.0]]"
    assert all(
        torch.equal(value, before[name]) and value.device.type == "cpu" for name, value in module.state_dict().items()
    )
