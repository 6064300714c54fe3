"""GGUF: what llama.cpp, Ollama and LM Studio read.

Architectures that are written: see `ARCHITECTURES`. llama.cpp rotates neighbouring
numbers of a head of the Llama family, transformers those that are half a head apart: rows of queries and keys are
reordered. Tokenizers: byte-level BPE whose pieces of text are cut as one of `PRE_TOKENIZERS` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.compression.export.llama_cpp import MISSING, compared_in_llama_cpp
from jupyter_llmcloud.compression.export.parity import check_installed, compare
from jupyter_llmcloud.compression.sources import SourceModel
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut before pairs are merged: "" is what ByteLevel does by itself, as GPT-2 does.
PRE_TOKENIZERS = {"": "gpt-2", _QWEN: "qwen2", _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMAL, _CONTROL, _OWN, _UNUSED = 1, 3, 4, 5  # kinds of tokens


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer as the file has it."""

    texts: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str


def write_gguf(
    loaded: LoadedModel, source: SourceModel, out: Path, weights: str, tell: Callable[[str], None]
) -> list[str]:
    """Write the file; returns notes. Raises UsageError without its package, ModelError for what it cannot hold."""
    check_installed("gguf", "gguf")
    import gguf

    config = loaded.model.config
    architecture = _architecture(loaded)
    tokens = _tokens(loaded)
    tell(f"{source.name} is written")
    writer = gguf.GGUFWriter(str(out), architecture)
    _write_shape(writer, config, loaded.context_length, source.name, weights)
    _write_tokens(writer, tokens, loaded)
    for name, value in _tensors(loaded, architecture):
        kind = _kind(gguf, name, value, weights)
        writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _compared(loaded, out, weights, tell)


def _architecture(loaded: LoadedModel) -> str:
    name, config = type(loaded.model).__name__, loaded.model.config
    if name not in ARCHITECTURES:
        other = "" if config.is_encoder_decoder else " --to onnx may take it."
        raise ModelError(f"--to gguf knows {', '.join(ARCHITECTURES)}, and this is a {name}.{other}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"--to gguf knows plain rotary positions, and this model's are {rope['rope_type']!r}.")
    window = getattr(config, "sliding_window", None)
    if window and window < loaded.context_length and getattr(config, "use_sliding_window", True):
        raise ModelError(f"--to gguf writes models whose tokens see all before them, and these see {window}.")
    biased = [key for key in ("attention_bias", "mlp_bias") if getattr(config, key, False)]
    if biased and ARCHITECTURES[name] != "qwen2":
        raise ModelError(f"--to gguf knows no {name} with {biased[0]}.")
    return ARCHITECTURES[name]


def _tokens(loaded: LoadedModel) -> _Tokens:
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("--to gguf knows fast tokenizers only (tokenizer.json), and this model's is not one.")
    told = json.loads(backend.to_str())
    model = told["model"]
    pre = _pre_tokenizer(told.get("pre_tokenizer") or {})
    is_known = pre is not None and bool(model.get("ignore_merges")) == (pre == "llama-bpe")
    if model.get("type") != "BPE" or model.get("byte_fallback") or told.get("normalizer") or not is_known:
        raise ModelError(
            f"--to gguf knows byte-level BPE as GPT-2, Llama 3 and Qwen cut texts, and this tokenizer is another one "
            f"({model.get('type')}). --to onnx keeps the tokenizer out of the file."
        )
    texts = [f"[PAD{number}]" for number in range(loaded.num_vocabulary)]
    kinds = [_UNUSED] * len(texts)
    for text, number in model["vocab"].items():
        texts[number], kinds[number] = text, _NORMAL
    for added in told.get("added_tokens") or ():
        texts[added["id"]], kinds[added["id"]] = added["content"], _CONTROL if added.get("special") else _OWN
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return _Tokens(texts, kinds, merges, str(pre))


def _pre_tokenizer(told: dict[str, Any]) -> str | None:
    """What llama.cpp calls it; None: it has none like this."""
    parts = told.get("pretokenizers", [told])
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    splits = [part for part in parts if part.get("type") == "Split"]
    if len(levels) != 1 or levels[0].get("add_prefix_space") or len(levels) + len(splits) != len(parts):
        return None
    if not splits:
        return PRE_TOKENIZERS[""] if levels[0].get("use_regex", True) else None
    is_plain = len(splits) == 1 and not levels[0].get("use_regex", True) and splits[0].get("behavior") == "Isolated"
    return PRE_TOKENIZERS.get(splits[0]["pattern"].get("Regex", "-")) if is_plain else None


def _write_shape(writer: Any, config: Any, context_length: int, name: str, weights: str) -> None:
    import gguf

    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[weights]))


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _write_tokens(writer: Any, tokens: _Tokens, loaded: LoadedModel) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.kinds)
    writer.add_token_merges(tokens.merges)
    tokenizer = loaded.tokenizer
    for known, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if known is not None:
            add(known)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    writer.add_add_bos_token(begins)
    if template := getattr(tokenizer, "chat_template", None):
        writer.add_chat_template(template)


def _tensors(loaded: LoadedModel, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    config = loaded.model.config
    for name, weight in loaded.model.state_dict().items():
        value = weight.detach().float()
        part, _, kind = name.rpartition(".")
        if part == "model.embed_tokens":
            yield "token_embd.weight", value
        elif part == "model.norm":
            yield "output_norm.weight", value
        elif part == "lm_head":
            if not config.tie_word_embeddings:
                yield "output.weight", value
        else:
            _, _, number, layer = part.split(".", 3)
            if layer not in _LAYER:
                raise ModelError(f"--to gguf does not know the layer {part} of this model.")
            if architecture == "llama" and layer in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
                yield f"blk.{number}.{_LAYER[layer]}.{kind}", _neighbours(value, heads).contiguous()
            else:
                yield f"blk.{number}.{_LAYER[layer]}.{kind}", value.contiguous()


def _neighbours(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head so that those which are rotated together stand side by side."""
    halves = weight.view(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _kind(gguf: Any, name: str, value: torch.Tensor, weights: str) -> Any:
    """Norms and biases are float32; of q8_0 what does not come in blocks of 32 is float16."""
    if value.ndim == 1 or weights == "f32":
        return gguf.GGMLQuantizationType.F32
    if weights == "q8_0" and value.shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return getattr(gguf.GGMLQuantizationType, weights.upper())


def _compared(loaded: LoadedModel, file: Path, weights: str, tell: Callable[[str], None]) -> list[str]:
    """As transformers reads the file; and in llama.cpp, where one of its packages is installed."""
    tell("the file is compared as transformers reads it")
    try:
        read = _read_again(file)
    except Exception as error:  # it reads fewer files than llama.cpp does: by names of models, sizes of heads
        problem = f"transformers cannot read the file ({type(error).__name__}: {str(error)[:200]})"
        notes = compared_in_llama_cpp(loaded, file, weights, tell)
        if notes == [MISSING]:
            raise ModelError(f"{problem}; it is {MISSING}. The file was not kept.") from None
        return [problem, *notes]
    notes = compare(loaded, read, "transformers, which has read the file", weights)
    return [*notes, *compared_in_llama_cpp(loaded, file, weights, tell)]


def _head_size(file: Path) -> int:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    return int(reader.fields[f"{architecture}.attention.key_length"].contents())


def _read_again(file: Path) -> Callable[[Sequence[int]], Any]:
    """The scores of a model that is made of nothing but the file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(config, "head_dim"):  # which transformers does not read of every architecture
        config.head_dim = _head_size(file)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32
    ).eval()

    @torch.inference_mode()
    def scores(tokens: Sequence[int]) -> Any:
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    return scores
