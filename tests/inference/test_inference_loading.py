"""Only whole models in safetensors are loaded, and what is missing is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import defaults_for_sampling, load_model
from tests.support.tiny_models import save_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def only_half_of_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def one_value_is(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (only_pickles, "pytorch_model.bin"),
        (no_tokenizer, "no tokenizer"),
        (truncated, "could not be loaded"),
        (only_half_of_the_weights, "lacks 9 of the model's weights"),
        (one_value_is(float("nan")), r"1 of the model's weights have NaN or infinite values \(model.norm.weight\)"),
        (one_value_is(float("inf")), "NaN or infinite values"),
        (an_adapter, "merge_and_unload"),
        (code_of_its_own, "could not be loaded"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused_with_the_reason(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_model(folder)
    assert not (folder / "ran").exists()


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("saved", "asked", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_asked(
    tmp_path: Path, saved: torch.dtype, asked: str, expected: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny_llama(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder, dtype=saved).save_pretrained(folder)
    assert load_model(folder, dtype=asked).model.dtype is expected


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="int3"):
        load_model(folder, dtype="int3")


def test_what_serving_needs_is_read_from_the_folder(folder: Path) -> None:
    loaded = load_model(folder)
    assert (loaded.context_length, loaded.eos, loaded.is_encoder_decoder) == (256, {1}, False)
    assert loaded.num_vocabulary == len(loaded.tokenizer)


def test_recommended_sampling_counts_only_when_sampling_is_recommended(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_k": 20}))
    assert defaults_for_sampling(folder) == {}
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None}))
    assert defaults_for_sampling(folder) == {"temperature": 0.6, "top_k": 20}
    path.unlink()
    assert defaults_for_sampling(folder) == {}
