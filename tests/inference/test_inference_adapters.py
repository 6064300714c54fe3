"""Adapters of PEFT on their base model, and tokenizers that are written in Python, are served like any other model."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.base import Generation, Sampling
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.inference.openai.asking import ask_completion
from jupyter_llmcloud.inference.openai.completion import Completion, ServedModel
from jupyter_llmcloud.storage.model_folder import check_folder
from tests.support.tiny_models import byte_level_tokenizer, one_thread, save_tiny_llama


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "base")


def trained(base: Path, folder: Path, **options: Any) -> Any:
    """A model with an adapter that says something else than its base; saved in `folder`, without a tokenizer."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([[5, 9, 20, 33]])).logits
        return found


def test_an_adapter_is_served_merged_into_the_base_model_that_it_names(base: Path, tmp_path: Path) -> None:
    adapted = trained(base, tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter")
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(loaded.model), logits(adapted), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(loaded.model), logits(load_model(base).model), atol=0.1)

    async def first_tokens() -> list[int]:
        engine = await open_engine(loaded, 2)
        try:
            generation = Generation([5, 9, 20, 33], 1, Sampling(temperature=0.0))
            return [token async for batch in engine.submit(generation) for token in batch.tokens]
        finally:
            await engine.close()

    with one_thread():
        assert asyncio.run(first_tokens()) == [int(logits(adapted)[0, -1].argmax())]


def names_a_base(adapter: Path, name: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", None, "", "/nowhere/at/all"])
def test_an_adapter_whose_base_model_is_not_here_says_how_to_name_it(base: Path, tmp_path: Path, name: Any) -> None:
    adapted = trained(base, tmp_path / "adapter")
    names_a_base(tmp_path / "adapter", name)
    with pytest.raises(ModelError, match="--base-model FOLDER"):
        load_model(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter", base_model=base)
    torch.testing.assert_close(logits(loaded.model), logits(adapted), atol=1e-4, rtol=1e-4)


def test_an_adapter_may_name_its_base_model_by_a_relative_path(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    names_a_base(tmp_path / "adapter", "../base")
    assert check_folder(tmp_path / "adapter").folder == base


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    other = tmp_path / "other"
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=1, n_head=2, eos_token_id=1)).save_pretrained(other)
    byte_level_tokenizer().save_pretrained(other)
    with pytest.raises(ModelError, match="adapter"):
        load_model(tmp_path / "adapter", base_model=other)


def test_an_adapter_that_lacks_weights_is_refused_with_their_names(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained(base, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1" not in name}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"6 weights are missing .*layers\.1"):
        load_model(tmp_path / "adapter")


def test_tokens_that_were_added_for_an_adapter_come_with_it(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    names_a_base(tmp_path / "adapter", str(base))
    loaded = load_model(tmp_path / "adapter")
    assert (loaded.num_vocabulary, loaded.tokenizer.convert_tokens_to_ids("<|tool|>")) == (385, 384)
    torch.testing.assert_close(logits(loaded.model), logits(adapted), atol=1e-4, rtol=1e-4)


def test_an_adapter_that_cannot_be_merged_is_refused_by_its_kind(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="an adapter of kind PROMPT_TUNING, which cannot be merged"):
        load_model(tmp_path / "adapter")


def test_without_peft_an_adapter_names_the_extra_that_brings_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(base, tmp_path / "adapter")
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'jupyter-llmcloud\[peft\]'"):
        load_model(tmp_path / "adapter")


def byt5(folder: Path) -> LoadedModel:
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    assert not (folder / "tokenizer.json").exists()
    return load_model(folder)


def test_a_tokenizer_that_is_written_in_python_is_served(tmp_path: Path) -> None:
    loaded = byt5(tmp_path)

    async def answer() -> dict[str, Any]:
        model = ServedModel(loaded, await open_engine(loaded, 2), "byt5")
        try:
            ask = ask_completion(
                model, b'{"model": "byt5", "prompt": "Gr\xc3\xb6\xc3\x9fe", "max_tokens": 5, "temperature": 0}'
            )
            assert ask.prompts == [[byte + 3 for byte in "Größe".encode()] + [1]]
            return await Completion(model, ask).whole()
        finally:
            await model.close()

    with one_thread():
        assert asyncio.run(answer())["usage"]["completion_tokens"] >= 1
