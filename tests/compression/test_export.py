"""Files for other runtimes: what they hold, what they refuse, and that a wrong one is noticed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from jupyter_llmcloud.compression.export import exporting
from jupyter_llmcloud.compression.export.exporting import export
from jupyter_llmcloud.compression.export.gguf_file import _neighbours
from jupyter_llmcloud.compression.export.parity import check_installed, compare, model_scores
from jupyter_llmcloud.errors import ModelError, UsageError
from jupyter_llmcloud.inference.engines.loading import LoadedModel, load_model
from jupyter_llmcloud.protocol.compression import Event, Exported, ExportRequest
from tests.support.tiny_models import byte_level_tokenizer, one_thread, save_tiny_llama


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("whole") / "model", context_length=64)


def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32")


def exported(folder: Path, to: str, **options: Any) -> Exported:
    told: list[Event] = []
    export(ExportRequest(target=str(folder), to=to, **options), told.append)
    return next(event for event in told if isinstance(event, Exported))


def test_scores_of_another_runtime_are_compared_and_so_are_the_tokens_it_would_write(folder: Path) -> None:
    model = loaded(folder)
    (note,) = compare(model, lambda tokens: model_scores(model, tokens) + 1e-4, "Another")
    assert note.startswith("Another: largest difference of scores 0.0001") and note.endswith(
        "greedy tokens are the same"
    )

    def other_choice(tokens: Any) -> torch.Tensor:
        found = model_scores(model, tokens).clone()
        best = found[-6].topk(2)
        found[-6, best.indices[1]] = best.values[0] + 1e-3
        return found

    (note,) = compare(model, other_choice, "Another", "q8_0")
    assert "greedy tokens are the same, the first other one is number" in note


def test_a_runtime_that_computes_something_else_is_noticed(folder: Path) -> None:
    model = loaded(folder)
    with pytest.raises(ModelError, match="is not what the model computes"):
        compare(model, lambda tokens: model_scores(model, tokens).flip(0), "Another", "q8_0")
    with pytest.raises(ModelError, match="scores of the shape"):
        compare(model, lambda tokens: model_scores(model, tokens)[:, :9], "Another")


def test_rows_are_reordered_so_that_neighbours_rotate_as_halves_did() -> None:
    heads, size, position = 2, 8, 3
    weight = torch.randn(heads * size, 5, generator=torch.Generator().manual_seed(0))
    given = torch.randn(5, generator=torch.Generator().manual_seed(1))
    angles = position / 10_000 ** (torch.arange(0, size, 2) / size)
    halves = (weight @ given).view(heads, 2, size // 2)
    rotated = torch.stack([halves[:, 0] * angles.cos() - halves[:, 1] * angles.sin(),
                           halves[:, 1] * angles.cos() + halves[:, 0] * angles.sin()])  # fmt: skip
    pairs = (_neighbours(weight, heads) @ given).view(heads, size // 2, 2)
    beside = torch.stack([pairs[..., 0] * angles.cos() - pairs[..., 1] * angles.sin(),
                          pairs[..., 1] * angles.cos() + pairs[..., 0] * angles.sin()])  # fmt: skip
    assert torch.allclose(rotated, beside, atol=1e-5)


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_a_gguf_file_has_the_weights_the_shape_and_the_tokenizer(
    folder: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(exporting, "scheme_of", lambda folder: weights == "f32" or None)
    done = exported(folder, "gguf", out=str(tmp_path / "m.gguf"), weights=weights)
    assert any("quantized weights are written as the numbers" in note for note in done.notes) == (weights == "f32")
    reader = gguf.GGUFReader(done.path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    own = loaded(folder).model.state_dict()
    assert len(tensors) == len(own)
    norm = torch.from_numpy(tensors["blk.1.ffn_norm.weight"].data.copy())
    assert torch.equal(norm, own["model.layers.1.post_attention_layernorm.weight"])
    up = tensors["blk.1.ffn_up.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type).copy())
    expected = own["model.layers.1.mlp.up_proj.weight"]
    assert torch.allclose(values, expected, atol=0 if weights == "f32" else 0.01)
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["tokenizer.ggml.tokens"].contents()[:2] == ["<s>", "</s>"]
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_heads_of_another_size_than_a_family_has_are_compared_as_the_file_says(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tokenizer = byte_level_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    done = exported(tmp_path / "qwen3", "gguf", out=str(tmp_path / "m.gguf"), weights="f32")
    assert any("transformers, which has read the file" in note for note in done.notes)


def test_what_a_file_cannot_hold_is_refused_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import transformers

    tokenizer = byte_level_tokenizer()
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
                                     bos_token_id=0, eos_token_id=1)  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="this is a GPT2LMHeadModel"):
        exported(tmp_path / "gpt2", "gguf", out=str(tmp_path / "m.gguf"))
    scaled = save_tiny_llama(
        tmp_path / "scaled", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    )
    with pytest.raises(ModelError, match="plain rotary positions, and this model's are 'linear'"):
        exported(scaled, "gguf", out=str(tmp_path / "m.gguf"))
    with pytest.raises(UsageError, match="expected a file in a folder that is there"):
        exported(folder, "gguf", out=str(tmp_path / "nowhere" / "m.gguf"))
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(folder: Path) -> None:
    from jupyter_llmcloud.compression.export.gguf_file import _pre_tokenizer

    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert _pre_tokenizer(level) == "gpt-2"
    assert _pre_tokenizer({**level, "add_prefix_space": True}) is None
    own = {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": False}
    assert _pre_tokenizer({"type": "Sequence", "pretokenizers": [own, {**level, "use_regex": False}]}) is None
    assert _pre_tokenizer({"type": "Metaspace"}) is None


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--to gguf needs the package gguf: pip install 'jupyter-llmcloud\[export\]'"):
        check_installed("gguf", "gguf")


def test_the_file_is_in_the_folder_of_the_run_or_beside_the_model(folder: Path, own_root: Path) -> None:
    from jupyter_llmcloud.compression.export.exporting import _default

    beside: Any = SimpleNamespace(name="m", run_id="", folder=folder)
    assert _default(beside, "onnx") == folder.parent / "m.onnx"
    (own_root / "runs" / "m-1").mkdir(parents=True)
    of_run: Any = SimpleNamespace(name="m", run_id="m-1", folder=folder)
    assert _default(of_run, "gguf") == own_root / "runs" / "m-1" / "export" / "m.gguf"


class LlamaCpp:
    """In place of xllamacpp: tells the likeliest tokens of a model, whose scores may be off."""

    ggml_type = SimpleNamespace(GGML_TYPE_F32=0)
    llama_flash_attn_type = SimpleNamespace(LLAMA_FLASH_ATTN_TYPE_DISABLED=0)

    def __init__(self, model: LoadedModel, off: float = 0.0) -> None:
        self.model, self.off = model, off

    def CommonParams(self) -> SimpleNamespace:
        return SimpleNamespace(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace(), n_ctx=0
        )

    def Server(self, params: SimpleNamespace) -> LlamaCpp:
        assert params.n_ctx == self.model.context_length and params.model.path
        return self

    listening_address = "http://127.0.0.1:1"

    def handle_completions(self, asked: dict[str, Any]) -> dict[str, Any]:
        tokens, rows = list(asked["prompt"]), []
        for _ in range(asked["n_predict"]):
            best = model_scores(self.model, tokens)[-1].log_softmax(-1).topk(asked["n_probs"])
            likely = [
                {"id": int(i), "logprob": float(v) + self.off} for i, v in zip(best.indices, best.values, strict=True)
            ]
            rows.append({"id": likely[0]["id"], "top_logprobs": likely})
            tokens.append(likely[0]["id"])
        return {"choices": [{"logprobs": {"content": rows}}]}


def test_a_file_is_compared_in_llama_cpp_by_what_it_finds_likely(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import httpx

    from jupyter_llmcloud.compression.export import llama_cpp

    model = loaded(folder)
    whole = [model.tokenizer.decode([ident]).isascii() for ident in range(model.num_vocabulary)]
    model.model.lm_head.weight.data[~torch.tensor(whole)] = 0  # never half of a character
    tokens = model.tokenizer(llama_cpp.TEXT, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(httpx, "post", lambda *_, **__: SimpleNamespace(json=lambda: {"tokens": tokens}))
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: name == "xllamacpp" or None)

    def compared(off: float) -> list[str]:
        monkeypatch.setitem(sys.modules, "xllamacpp", LlamaCpp(model, off))
        return llama_cpp.compared_in_llama_cpp(model, tmp_path / "m.gguf", "f32", lambda text: None)

    [note] = compared(0.0)
    assert "llama.cpp: largest difference of log-probabilities" in note and "greedy tokens are the same" in note
    with pytest.raises(ModelError, match=r"what llama\.cpp computes of the file is not what the model computes"):
        compared(2.0)
    tokens.append(3)
    with pytest.raises(ModelError, match="cuts a text into other tokens"):
        compared(0.0)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert compared(0.0) == [llama_cpp.MISSING]
