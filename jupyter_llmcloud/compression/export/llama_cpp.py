"""A GGUF file in llama.cpp itself, by whichever of its Python packages is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jupyter_llmcloud.compression.export.parity import FAR, compare, greedy, model_scores, num_greedy
from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel

TEXT = "The for statement is used to iterate, naïve 東京 123."
_CANDIDATES = 64  # of each token, whose probabilities are compared
MISSING = "not compared in llama.cpp itself: that needs xllamacpp or llama-cpp-python (pip install xllamacpp)"


def compared_in_llama_cpp(loaded: LoadedModel, file: Path, weights: str, tell: Callable[[str], None]) -> list[str]:
    """Notes on what llama.cpp computes of the file. Raises ModelError when that is not what the model computes."""
    by_package = {"llama_cpp": _in_llama_cpp_python, "xllamacpp": _in_xllamacpp}
    for package, compared in by_package.items():
        if importlib.util.find_spec(package) is not None:
            tell("the file is compared in llama.cpp")
            return compared(loaded, file, weights)
    return [MISSING]


def _in_llama_cpp_python(loaded: LoadedModel, file: Path, weights: str) -> list[str]:
    from llama_cpp import Llama

    llama = Llama(str(file), n_ctx=loaded.context_length, logits_all=True, verbose=False, n_threads=1)

    def scores(tokens: Sequence[int]) -> Any:
        llama.reset()
        llama.eval(list(tokens))
        return llama.scores[: len(tokens)].copy()

    _check_tokens(loaded, llama.tokenize(TEXT.encode(), add_bos=False, special=False))
    return compare(loaded, scores, "llama.cpp", weights)


def _in_xllamacpp(loaded: LoadedModel, file: Path, weights: str) -> list[str]:
    """It tells the likeliest tokens with their probabilities, no scores; and generates by itself."""
    import httpx
    import xllamacpp

    server = xllamacpp.Server(_parameters(xllamacpp, loaded, file))
    made = httpx.post(f"{server.listening_address}/tokenize", json={"content": TEXT, "add_special": False}, timeout=60)
    _check_tokens(loaded, made.json()["tokens"])
    wanted = num_greedy(loaded)
    tokens = greedy(loaded, wanted)
    prompt, mine = tokens[:-wanted], tokens[-wanted:]
    # Of a token that ends within a character it tells nothing: it is compared as far as there is none.
    wanted = next((at for at in range(wanted) if "�" in loaded.tokenizer.decode(mine[: at + 1])), wanted)
    if not wanted:
        return ["not compared in llama.cpp: the model's text begins with a part of a character"]
    reply = server.handle_completions(
        {"prompt": prompt, "n_predict": wanted, "temperature": 0, "n_probs": _CANDIDATES, "ignore_eos": True}
    )
    if "choices" not in reply:
        raise ModelError(f"llama.cpp cannot read the file: {str(reply)[:300]}. The file was not kept.")
    rows = reply["choices"][0]["logprobs"]["content"][:wanted]
    theirs = [int(row["id"]) for row in rows]
    same = next((at for at, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), wanted)
    logits = model_scores(loaded, tokens)[len(prompt) - 1 : len(prompt) - 1 + wanted]
    expected, largest = logits.log_softmax(-1), float(logits.abs().max())
    compared = rows[: min(same + 1, wanted)]  # after another token another text is read
    difference = max(
        abs(candidate["logprob"] - float(expected[at, candidate["id"]]))
        for at, row in enumerate(compared)
        for candidate in row["top_logprobs"]
        if candidate["logprob"] > -20  # an impossible token is told as one that is very unlikely
    )
    if not difference <= FAR[weights] * largest:
        raise ModelError(
            f"what llama.cpp computes of the file is not what the model computes: log-probabilities differ by up to "
            f"{difference:.3g} (scores are up to {largest:.3g}). The file was not kept."
        )
    told = f"all {wanted} greedy tokens are the same"
    if same < wanted:
        told = f"the first {same} of {wanted} greedy tokens are the same"
    return [f"llama.cpp: largest difference of log-probabilities {difference:.2g} (scores up to {largest:.3g}); {told}"]


def _parameters(xllamacpp: Any, loaded: LoadedModel, file: Path) -> Any:
    found = xllamacpp.CommonParams()
    found.model.path = str(file)
    found.n_parallel, found.n_ctx = 1, loaded.context_length
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = torch.get_num_threads()
    found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    found.flash_attn_type = off
    found.hostnames, found.port, found.cache_ram_mib = ["127.0.0.1"], 0, 0
    return found


def _check_tokens(loaded: LoadedModel, theirs: Sequence[int]) -> None:
    if list(loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]) != list(theirs):
        raise ModelError("llama.cpp cuts a text into other tokens than this tokenizer. The file was not kept.")
