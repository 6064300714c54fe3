"""llama.cpp's server on a model in the Hugging Face layout, with the same float32 weights; run by the peers' Python.

Arguments: the folder of a Llama, a folder to write into, how many sequences at once, tokens of each. Prints its address,
and serves until stdin ends.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from safetensors.numpy import load_file


def convert(folder: Path, target: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(target, "llama")
    num_heads, num_key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // num_heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_bytes()), config)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        of = f"model.layers.{layer}."
        named = {
            "attn_norm": weights[f"{of}input_layernorm.weight"],
            "ffn_norm": weights[f"{of}post_attention_layernorm.weight"],
            "attn_q": paired(weights[f"{of}self_attn.q_proj.weight"], num_heads),
            "attn_k": paired(weights[f"{of}self_attn.k_proj.weight"], num_key_heads),
            "attn_v": weights[f"{of}self_attn.v_proj.weight"],
            "attn_output": weights[f"{of}self_attn.o_proj.weight"],
            "ffn_gate": weights[f"{of}mlp.gate_proj.weight"],
            "ffn_up": weights[f"{of}mlp.up_proj.weight"],
            "ffn_down": weights[f"{of}mlp.down_proj.weight"],
        }
        for name, weight in named.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def paired(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours where transformers rotates halves."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, config: dict) -> None:
    names = {token: name for name, token in tokenizer["model"]["vocab"].items()}
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    names |= {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    count = config["vocab_size"]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(token, f"<unused{token}>") for token in range(count)])
    writer.add_token_types([
        kinds.CONTROL if token in special else kinds.NORMAL if token in names else kinds.UNUSED
        for token in range(count)
    ])  # fmt: skip
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def main() -> None:
    folder, place, num_parallel, length = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    model = place / "model.gguf"
    convert(folder, model)
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel, params.n_ctx = num_parallel, num_parallel * length
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


main()
