"""Only whole models in safetensors are loaded, and what is missing is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import defaults_for_sampling, load_model
from tests.support.tiny_models import byte_level_tokenizer, save_tiny_llama, tiny_llama


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


def a_config_of_fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def a_config_of_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def a_config_of_wider_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))


def layers_of_peft(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("q_proj.", "q_proj.base_layer."): value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def a_larger_tokenizer(folder: Path) -> None:
    tokenizer = byte_level_tokenizer(384)
    tokenizer.add_tokens(["<|one|>", "<|two|>"])
    tokenizer.save_pretrained(folder)


def a_tokenizer_without_the_end(folder: Path) -> None:
    tokenizer = byte_level_tokenizer(384)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 383}))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {text: token for text, token in state["model"]["vocab"].items() if token < 300}
    state["model"] |= {"vocab": kept, "merges": [m for m in state["model"]["merges"] if "".join(m) in kept]}
    (folder / "tokenizer.json").write_text(json.dumps(state))


def a_tokenizer_with_another_end(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 70}))


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
        (a_config_of_fewer_layers, r"holds 9 weights that its config.json does not know \(model.layers.1."),
        (a_config_of_more_layers, r"lacks 9 of the model's weights \(model.layers.2."),
        (
            a_config_of_wider_layers,
            r"holds 6 weights of another shape .*down_proj.weight: \(64, 128\), not \(64, 256\)",
        ),
        (layers_of_peft, r"lacks 2 of the model's weights .* holds 2 weights that its config.json does not know"),
        (a_larger_tokenizer, r"2 tokens of the tokenizer are beyond the model's 384 embeddings \('<\|one\|>' is 384"),
        (a_tokenizer_without_the_end, "ends a text with token 383 .* the tokenizer has no such token: it has 300"),
        (a_tokenizer_with_another_end, "ends a text with token 70 .* which is an ordinary '.*' for the tokenizer"),
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


SIZE = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        ("BertConfig", "BertLMHeadModel", "an encoder: BertLMHeadModel reads a text in both directions"),
        ("RobertaConfig", "RobertaForCausalLM", "an encoder: RobertaForCausalLM .*config.json says is_decoder: false"),
        ("ElectraConfig", "ElectraForCausalLM", "an encoder: ElectraForCausalLM"),
        ("BertConfig", "BertForMaskedLM", "a BertForMaskedLM, which has no head that generates text"),
        ("RobertaConfig", "RobertaForSequenceClassification", "no head that generates text"),
        ("LlamaConfig", "LlamaForSequenceClassification", "a LlamaForSequenceClassification, which has no head"),
        ("LlamaConfig", "LlamaModel", "a LlamaModel, which has no head"),
    ],
)
def test_a_model_that_cannot_generate_text_is_refused_by_name_with_the_reason(
    tmp_path: Path, config: str, model: str, message: str, dtype: torch.dtype
) -> None:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZE))
    made.to(dtype).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_an_encoder_that_was_made_a_decoder_is_served(tmp_path: Path) -> None:
    import transformers

    transformers.BertLMHeadModel(transformers.BertConfig(**SIZE, is_decoder=True)).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert type(load_model(tmp_path).model).__name__ == "BertLMHeadModel"


def test_embeddings_that_are_padded_to_a_round_size_are_no_other_vocabulary(tmp_path: Path) -> None:
    tiny_llama(512).save_pretrained(tmp_path)
    byte_level_tokenizer(384).save_pretrained(tmp_path)
    assert load_model(tmp_path).num_vocabulary == 512


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
