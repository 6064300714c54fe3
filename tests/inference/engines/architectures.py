"""Tiny models of many architectures, with weights large enough that a token depends on all before it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from jupyter_llmcloud.inference.engines.loading import LoadedModel

VOCABULARY = 97
CONTEXT = 256
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_MODERN = {
    **_COMMON, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_MODERN),
    "llama with biases": lambda: transformers.LlamaConfig(**_MODERN, attention_bias=True, mlp_bias=True),
    "mistral, a window of 24": lambda: transformers.MistralConfig(**_MODERN, sliding_window=24, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**_MODERN),
    "qwen2, windows in the upper layers": lambda: transformers.Qwen2Config(
        **_MODERN, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_MODERN, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**_MODERN, head_dim=16),
    "gemma2, windows and bounded scores": lambda: transformers.Gemma2Config(
        **_MODERN, head_dim=16, sliding_window=24, query_pre_attn_scalar=16
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_MODERN, "num_hidden_layers": 6}, head_dim=16, sliding_window=24, query_pre_attn_scalar=16
    ),
    "phi3": lambda: transformers.Phi3Config(**_MODERN),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_embd=48, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.3
    ),
    "gpt neox": lambda: transformers.GPTNeoXConfig(
        **{**_MODERN, "num_key_value_heads": None}, rotary_pct=0.5
    ),
    "opt": lambda: transformers.OPTConfig(
        **_COMMON, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=48, init_std=0.3,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_MODERN, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "gpt-oss, sinks": lambda: transformers.GptOssConfig(
        **_MODERN, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=24
    ),
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "bloom, positions as a bias": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_COMMON),
    "mamba, a state": lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **_COMMON),
    "positions that change with length": lambda: transformers.LlamaConfig(
        **_MODERN,
        rope_parameters={
            "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        },
    ),
}  # fmt: skip


def tiny_model(make: Any) -> LoadedModel:
    """A model with the weights of seed 0, as it would be loaded."""
    torch.manual_seed(0)
    config = make()
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    except ValueError:
        model = transformers.AutoModelForCausalLM.from_config(make(), attn_implementation="eager").eval()
    return LoadedModel(
        model=model,
        tokenizer=None,
        context_length=CONTEXT,
        num_vocabulary=VOCABULARY,
        eos=frozenset({1}),
        is_encoder_decoder=False,
    )
