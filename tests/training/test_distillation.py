"""A smaller model learns on two ranks what a larger one finds likely, and is saved as a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.training.compression.distillation import _rows, divergence
from tests.support.tiny_models import TEXT, byte_level_tokenizer, save_tiny_llama, tiny_llama
from tests.support.worlds import Ranks

CELL = """
from jupyter_llmcloud.training.compression import distillation as _distillation

distilled_model, distilled_tokenizer = _distillation.distill(run, {student!r}, {teacher!r}, {texts!r}, num_steps=12)
"""


def test_the_divergence_is_zero_for_equal_scores_and_the_mean_over_tokens() -> None:
    scores = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    assert float(divergence(scores + 3, scores)) == pytest.approx(0, abs=1e-6)
    certain = torch.tensor([[[50.0, 0.0], [0.0, 50.0]]])
    assert float(divergence(torch.zeros(1, 2, 2), certain)) == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)


def test_rows_of_a_vocabulary_that_only_one_of_them_was_filled_up_with_are_left_out() -> None:
    # Qwen2.5 of 7B has scores for 152064 tokens, that of 0.5B for 151936; their tokenizer has 151665.
    scores = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    wider = torch.cat([scores, torch.full((1, 3, 2), 4.0)], -1)
    assert float(divergence(scores, wider)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(wider, scores)) == pytest.approx(0, abs=1e-6)


def test_texts_become_windows_of_equal_length_or_are_too_short() -> None:
    tokenizer = byte_level_tokenizer()
    rows = _rows(TEXT, tokenizer, 16, 8)
    assert len(rows) >= 8 and rows.shape[1] <= 16 and rows[0, 0] == tokenizer(TEXT[0])["input_ids"][0]
    with pytest.raises(ModelError, match="has 2 tokens, and 8 windows need more"):
        _rows(["a"], tokenizer, 16, 8)


def test_a_model_learns_from_another_on_the_ranks(world: Ranks, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    save_tiny_llama(tmp_path / "teacher")
    tiny_llama(len(tokenizer), seed=1).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "texts.json").write_text(json.dumps(TEXT * 8))
    names = {name: str(tmp_path / name) for name in ("student", "teacher")}
    done = world.ok(
        CELL.format(**names, texts=str(tmp_path / "texts.json")), save=["distilled_model", "distilled_tokenizer"]
    )
    losses = done.values("loss")
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in (done.folder.path / "model").iterdir()}
