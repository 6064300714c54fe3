"""Each method by values: what it writes loads again, and computes what it should."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from jupyter_llmcloud.compression.making import make
from jupyter_llmcloud.compression.methods.merging import merge
from jupyter_llmcloud.compression.methods.precision import to_bfloat16
from jupyter_llmcloud.compression.methods.pruning import _left, _Shape, prune
from jupyter_llmcloud.compression.methods.quantization import write_quantized
from jupyter_llmcloud.compression.results import keep, origin_of
from jupyter_llmcloud.compression.sources import find_source
from jupyter_llmcloud.core.compression.methods import CompressionMethod
from jupyter_llmcloud.errors import ModelError, NotFound
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.inference.engines.quantized.linear import QuantizedLinear
from jupyter_llmcloud.inference.engines.quantized.packing import Scheme, dequantize, pack, quantize, unpack
from jupyter_llmcloud.inference.engines.select import open_engine
from jupyter_llmcloud.protocol.compression import CompressRequest, Event, Made, MethodRefused
from jupyter_llmcloud.storage.runs import RunRecord, RunStore
from jupyter_llmcloud.training import architecture
from tests.support.tiny_models import TEXT, byte_level_tokenizer, one_thread, save_tiny_llama, tiny_llama

IDS = torch.tensor([[5, 9, 70, 3, 200, 17, 33, 8]])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("whole") / "model", tie_word_embeddings=True)


@pytest.fixture
def target(folder: Path, tmp_path: Path) -> Path:
    """A folder with the tokenizer of the model, into which a method writes."""
    made = tmp_path / "made"
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    return made


@torch.inference_mode()
def scores(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits[0].float()
    return logits


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_are_packed_and_unpacked_as_they_were(bits: int) -> None:
    largest = 1 << (bits - 1)
    numbers = torch.arange(-largest, largest).repeat(3)[: 3 * 13].view(3, 13).to(torch.int8)
    words = pack(numbers, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-13 * bits // 32))
    assert torch.equal(unpack(words, bits, 13), numbers)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32)], ids=["int8", "int4"])
def test_a_quantized_weight_is_nowhere_farther_off_than_half_a_step(scheme: Scheme) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    numbers, scale = quantize(weight, scheme, torch.float32)
    step = scale.repeat_interleave(scheme.group or 64, dim=1)
    clipped = weight.clamp(-scheme.offset * step, (scheme.offset - 1) * step)
    assert float(((dequantize(numbers, scale) - clipped).abs() / step).max()) <= 0.5001
    zero, _ = quantize(torch.zeros(2, 64), scheme, torch.float32)
    assert not zero.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_computes_with_its_numbers_and_is_served_as_it_computes(
    folder: Path, target: Path, bits: int
) -> None:
    write_quantized(load_model(folder), bits, target)
    plain = load_model(target, dtype="float32")
    assert not any(isinstance(module, QuantizedLinear) for module in plain.model.modules())
    quantized = load_model(target)
    layers = [module for module in quantized.model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14 and quantized.model.dtype == torch.bfloat16
    assert quantized.num_parameters == load_model(folder).num_parameters
    assert quantized.model.generation_config.eos_token_id == load_model(folder).model.generation_config.eos_token_id
    whole = scores(load_model(folder, dtype="bfloat16").model)
    rounding = float((whole - scores(load_model(folder).model)).abs().max())
    assert float((scores(quantized.model) - scores(plain.model)).abs().max()) <= 3 * rounding
    original = load_model(folder).model.model.layers[1].mlp.up_proj.weight
    error = (plain.model.model.layers[1].mlp.up_proj.weight - original).abs().max() / original.abs().max()
    assert error < (0.006 if bits == 8 else 0.2)
    assert 3 * sum(file.stat().st_size for file in target.glob("*.safetensors")) < 2 * (
        (folder / "model.safetensors").stat().st_size
    )
    asyncio.run(_is_served(quantized))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_transposed_layers_of_gpt2_are_quantized_as_linear_ones(tmp_path: Path, target: Path, bits: int) -> None:
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    original = load_model(tmp_path / "gpt2")
    assert write_quantized(original, bits, target).startswith(f"8 linear layers with weights of {bits} bits")
    tokenizer.save_pretrained(target)
    quantized = load_model(target)
    assert sum(isinstance(module, QuantizedLinear) for module in quantized.model.modules()) == 8
    found = load_model(target, dtype="float32").model.transformer.h[1].mlp.c_fc.weight
    wanted = original.model.transformer.h[1].mlp.c_fc.weight.t()
    assert (found - wanted).abs().max() / wanted.abs().max() < (0.006 if bits == 8 else 0.2)
    asyncio.run(_is_served(quantized))


def test_where_most_weights_are_in_no_linear_layer_it_is_said(tmp_path: Path, target: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    note = write_quantized(load_model(tmp_path / "experts"), 8, target)
    assert note.startswith("8 linear layers") and "80% of its weights are in no linear layer (experts" in note


async def _is_served(loaded: LoadedModel) -> None:
    """An engine opens, whose trial compares it with the forward pass."""
    engine = await open_engine(loaded, 4, 1)
    assert engine.name == "slots"
    await engine.close()


def test_more_rows_than_a_kernel_is_fast_for_have_the_same_result() -> None:
    numbers, scale = quantize(
        torch.randn(48, 64, generator=torch.Generator().manual_seed(1)), Scheme(8), torch.bfloat16
    )
    layer = QuantizedLinear(numbers, scale, torch.linspace(-1, 1, 48).bfloat16(), 8)
    rows = torch.randn(100, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    together, alone = layer(rows), torch.cat([layer(row[None]) for row in rows])
    assert torch.allclose(together.float(), alone.float(), rtol=0.02, atol=0.05)


def test_pruning_leaves_what_computes_as_the_model_without_the_parts_that_went(folder: Path, target: Path) -> None:
    note = prune(load_model(folder), 0.5, TEXT, target)
    assert note == "2 of 4 heads and 64 of 128 rows of each layer's MLP"
    pruned = AutoModelForCausalLM.from_pretrained(target)
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads) == (2, 1)
    assert (pruned.config.intermediate_size, pruned.config.head_dim) == (64, 16)
    whole = load_model(folder).model
    for left, layer in zip(pruned.model.layers, whole.model.layers, strict=True):
        _silence(layer.self_attn.o_proj.weight, left.self_attn.o_proj.weight)
        _silence(layer.mlp.down_proj.weight, left.mlp.down_proj.weight)
    assert torch.allclose(scores(pruned), scores(whole), atol=1e-3)


@torch.no_grad()
def _silence(weight: torch.Tensor, left: torch.Tensor) -> None:
    """Zeros in the columns that are not in `left`, whose columns are in the same order."""
    columns = [
        column for column in range(weight.shape[1]) if any(torch.equal(weight[:, column], one) for one in left.T)
    ]
    assert len(columns) == left.shape[1]
    kept = weight[:, columns].clone()
    weight.zero_()
    weight[:, columns] = kept


def test_what_goes_is_what_the_rest_of_the_model_gets_least_of(folder: Path, target: Path) -> None:
    loaded = load_model(folder)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-3
            layer.self_attn.o_proj.weight[:, :32] *= 1e-3
    kept_heads = [layer.self_attn.q_proj.weight[32:].clone() for layer in loaded.model.model.layers]
    kept_rows = [layer.mlp.up_proj.weight[1::2].clone() for layer in loaded.model.model.layers]
    prune(loaded, 0.5, TEXT, target)
    saved = load_file(target / "model.safetensors")
    for number, (heads, rows) in enumerate(zip(kept_heads, kept_rows, strict=True)):
        assert torch.equal(saved[f"model.layers.{number}.self_attn.q_proj.weight"], heads)
        assert torch.equal(saved[f"model.layers.{number}.mlp.up_proj.weight"], rows)


def test_what_a_method_cannot_take_is_refused_in_a_word(folder: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"too small for prune:0\.001"):
        prune(load_model(folder), 0.001, TEXT, target)
    with pytest.raises(ModelError, match=r"too small for prune:0.99: of 2 groups of heads .* 0 and"):
        prune(load_model(folder), 0.99, TEXT, target)
    with pytest.raises(ModelError, match="there is nothing to merge"):
        merge(load_model(folder), find_source(str(folder)).layout, target)
    to_bfloat16(load_model(folder), target)
    with pytest.raises(ModelError, match="its weights are bfloat16 already"):
        to_bfloat16(load_model(target), tmp_path)
    write_quantized(load_model(folder), 8, target)
    for again in (
        lambda: write_quantized(load_model(target), 4, tmp_path),
        lambda: to_bfloat16(load_model(target), tmp_path),
    ):
        with pytest.raises(ModelError, match="quantized already"):
            again()


def test_heads_that_stay_are_as_many_as_the_architecture_takes() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=8, intermediate_size=256)
    shape = _Shape(num_heads=8, num_groups=8, head_size=8, num_rows=256)
    assert _left(config, shape, 0.5) == (4, 128)
    assert _left(config, shape, 0.25) == (8, 192), (
        "64 is no multiple of 6; of 4 and 8, which are as near, more are left"
    )
    assert _left(config, shape, 0.4) == (4, 152), "nor of 5"


def test_layers_that_are_not_alike_are_not_pruned(folder: Path, target: Path) -> None:
    loaded = load_model(folder)
    mlp = loaded.model.model.layers[0].mlp
    mlp.down_proj = torch.nn.Linear(64, 64, bias=False)
    with pytest.raises(ModelError, match="the layers of this model are not alike"):
        prune(loaded, 0.5, TEXT, target)


def test_quantized_files_that_are_not_complete_are_refused(folder: Path, target: Path) -> None:
    from safetensors.torch import save_file

    write_quantized(load_model(folder), 8, target)
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for broken, said in (
        ({key: value for key, value in tensors.items() if key != f"{name}.weight_scale"}, "is not complete"),
        ({key: value for key, value in tensors.items() if not key.startswith(name)}, "lacks 1 of the model's weights"),
        ({**tensors, f"{name}.weight_shape": torch.tensor([4, 4])}, "of another shape"),
        ({**tensors, "model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, "does not know"),
    ):
        save_file(broken, target / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            load_model(target)


def test_results_are_runs_that_say_what_they_were_made_of_and_a_refusal_keeps_the_others(
    folder: Path, own_root: Path
) -> None:
    told: list[Event] = []
    make(
        CompressRequest(target=str(folder), methods=["lora-merge", "bf16"], line="%compress m --method bf16"),
        told.append,
    )
    (refused,) = [event for event in told if isinstance(event, MethodRefused)]
    assert refused.method == "lora-merge" and "nothing to merge" in refused.reason
    (made,) = [event for event in told if isinstance(event, Made)]
    run = RunStore().find("model-bf16")
    assert (
        run.run_id == made.run_id and run.read().state == "finished" and run.source() == "%compress m --method bf16\n"
    )
    assert run.read().notes == [f"bf16 of {folder}: weights of float32 in bfloat16"]
    assert origin_of(run.model)["made_of"] == str(folder)
    source = find_source("model-bf16")
    assert source.run_id == run.run_id and source.name == "model-bf16"
    again = load_model(source.folder)
    assert again.model.dtype == torch.bfloat16 and again.tokenizer.decode([5]) == load_model(folder).tokenizer.decode(
        [5]
    )


def test_half_of_a_result_is_removed(folder: Path, own_root: Path) -> None:
    def fail(target: Path) -> str:
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(find_source(str(folder)), CompressionMethod("int8"), CompressRequest(target="m", methods=["int8"]), fail)
    assert list(RunStore().path.iterdir()) == []


def test_what_is_no_language_model_is_refused(tmp_path: Path, own_root: Path) -> None:
    from tests.support.tiny_models import save_tiny_bert

    with pytest.raises(ModelError, match="is a classifier: what can be compressed and exported are language models"):
        find_source(str(save_tiny_bert(tmp_path / "bert")))
    with pytest.raises(NotFound, match="there is no run 'nobody'"):
        find_source("nobody")


def test_an_adapter_is_merged_into_a_model_that_computes_as_both(folder: Path, target: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    expected = scores(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    source = find_source(str(tmp_path / "adapter"), str(folder))
    loaded = load_model(source.folder, base_model=source.layout.folder)
    assert merge(loaded, source.layout, target) == "the adapter in the weights of model"
    merged = AutoModelForCausalLM.from_pretrained(target)
    assert torch.allclose(scores(merged), expected, atol=1e-4)
    assert not json.loads((target / "config.json").read_bytes()).get("quantization_config")


def test_what_is_made_of_an_adapter_that_a_run_has_saved_is_a_model_of_transformers(
    folder: Path, tmp_path: Path, own_root: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    run = RunStore().folder("lora-1")
    run.create(RunRecord("lora-1", "lora", state="finished", artifacts={"model": "model"}), "1\n")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(run.model)
    architecture.write(adapted, run.model)  # as --save does
    told: list[Event] = []
    make(CompressRequest(target="lora", methods=["lora-merge", "int8"]), told.append)
    made = [event for event in told if isinstance(event, Made)]
    assert [event.method for event in made] == ["lora-merge", "int8"]
    for event in made:
        layout = find_source(event.name).layout
        assert layout.architecture is None
        found = scores(load_model(layout.folder, dtype="float32").model)
        assert float((found - scores(adapted)).abs().mean()) < (1e-4 if event.method == "lora-merge" else 0.2)


def test_a_teacher_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path, own_root: Path) -> None:
    tokenizer = byte_level_tokenizer(300)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    told: list[Event] = []
    methods = [f"distill:{tmp_path / 'teacher'}", f"distill:{folder}"]
    make(CompressRequest(target=str(folder), methods=methods), told.append)
    reasons = [event.reason for event in told if isinstance(event, MethodRefused)]
    assert "the teacher has another vocabulary (300 tokens, model has 384" in reasons[0]
    assert "a model learns nothing from itself" in reasons[1]


def test_a_scheme_with_rotations_beside_its_weights_is_none_of_ours() -> None:
    told = Scheme(4, 32).as_config()
    assert Scheme.of_config({**told, "transform_config": {}}) == Scheme(4, 32)
    rotated = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
    assert Scheme.of_config({**told, "transform_config": rotated}) is None


def test_scales_of_other_groups_than_the_configuration_says_are_refused(folder: Path, target: Path) -> None:
    from safetensors.torch import save_file

    write_quantized(load_model(folder), 4, target)
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, target / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name}: \(128, 1\), not \(128, 2\)"):
        load_model(target)


def test_a_head_that_was_trained_apart_from_its_embeddings_stays_apart(tmp_path: Path, target: Path) -> None:
    """As an adapter with a head of its own leaves it, on a model whose head is that of the embeddings."""
    loaded = load_model(save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True))
    loaded.model.lm_head.weight = torch.nn.Parameter(loaded.model.lm_head.weight.detach().flip(0).clone())
    write_quantized(loaded, 8, target)
    made = load_model(target, dtype="float32").model
    torch.testing.assert_close(made.lm_head.weight, loaded.model.lm_head.weight, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(scores(made).argmax(-1), scores(loaded.model).argmax(-1))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_architecture_that_asks_a_layer_for_the_type_of_its_weights_is_told_what_is_computed_with(
    bits: int, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that makes no weights: those of one layer, in each step, took as long as dozens of steps."""
    made: list[QuantizedLinear] = []
    monkeypatch.setattr(QuantizedLinear, "made_weight", made.append)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=64, d_ff=64, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=1, pad_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    byte_level_tokenizer().save_pretrained(tmp_path / "t5")
    write_quantized(load_model(tmp_path / "t5"), bits, target)
    given = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    with torch.inference_mode():
        found, wanted = (load_model(target, dtype=dtype).model(**given).logits for dtype in ("bfloat16", "float32"))
    assert float((found.float() - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert not made


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_of_a_quantized_layer_are_what_its_numbers_stand_for(bits: int) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    numbers, scale = quantize(weight, Scheme(bits, 32 if bits == 4 else 0), torch.bfloat16)
    layer = QuantizedLinear(numbers, scale, None, bits)
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.made_weight(), dequantize(numbers, scale), rtol=1e-2, atol=1e-3)
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert layer.weight.shape == (48, 64) and type(layer.weight.detach() * 1) is torch.Tensor
    torch.testing.assert_close(torch.nn.functional.linear(rows, layer.weight), rows @ layer.made_weight().T)
    with torch.inference_mode():
        assert torch.equal(layer.weight.T.float(), layer.made_weight().T.float())
