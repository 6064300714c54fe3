"""A Hugging Face folder to a model that is safe to serve: safetensors only, never code from the folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.soundness import check_causal, check_finite, check_vocabulary, check_weights
from jupyter_llmcloud.storage.model_folder import ModelLayout, check_folder

log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEFAULT_CONTEXT = 2048
_FOR_WEIGHTS = 0.8  # of a GPU's free memory, where a model is spread over several: the rest is for what is computed
_SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with what serving needs to know of it.

    Attributes:
        model: a `transformers.PreTrainedModel` in eval mode.
        tokenizer: its tokenizer.
        context_length: how many tokens prompt and answer may have together.
        num_vocabulary: how many token ids the model has scores and embeddings for.
        eos: ids that end a sequence.
        is_encoder_decoder: whether the prompt goes to an encoder.
        cache_bytes: what keys and values of its sequences may take; None: a share of what is free.
    """

    model: Any
    tokenizer: Any
    context_length: int
    num_vocabulary: int
    eos: frozenset[int]
    is_encoder_decoder: bool
    cache_bytes: int | None = None

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has."""
        unseen = sum(getattr(module, "num_unseen", 0) for module in self.model.modules())  # of quantized layers
        return unseen + sum(parameter.numel() for parameter in self.model.parameters())


def load_model(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    base_model: str | Path | None = None,
    max_model_len: int | None = None,
) -> LoadedModel:
    """Load the model in `folder`; raises `ModelError` with what is missing or wrong.

    Args:
        folder: config.json, *.safetensors and a tokenizer, as `save_pretrained` writes them; or an adapter of PEFT.
        dtype: "auto" takes the checkpoint's own.
        device: "cpu", "cuda:0", ... or "cuda:0,1" to spread its layers over several.
        base_model: the folder of an adapter's base model, when it is not the one that the adapter names.
        max_model_len: how many tokens prompt and answer may have together, when the model's own are too many.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known: use one of {', '.join(_DTYPES)}.")
    layout = check_folder(Path(folder), None if base_model is None else Path(base_model))
    with loading(folder):
        return shortened(_load(layout, dtype, device), max_model_len)


@contextmanager
def loading(folder: str | Path) -> Iterator[None]:
    """Much code of others runs inside on files of others: whatever it raises is about this folder (ModelError)."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder} could not be loaded: {type(error).__name__}: {error}") from error


def shortened(loaded: LoadedModel, max_model_len: int | None) -> LoadedModel:
    """With a context of so many tokens; raises ModelError when it has fewer."""
    if max_model_len is None:
        return loaded
    if max_model_len > loaded.context_length:
        raise ModelError(f"--max-model-len {max_model_len} is more than the model's {loaded.context_length} tokens.")
    return replace(loaded, context_length=max_model_len)


def _load(layout: ModelLayout, dtype: str, device: str) -> LoadedModel:
    from transformers import AutoConfig, AutoTokenizer

    from jupyter_llmcloud.inference.engines.quantized.loading import load_quantized, scheme_of

    folder = layout.folder
    tokenizer = AutoTokenizer.from_pretrained(layout.tokenizer, **_SAFE)
    _check_architecture(folder)
    config = AutoConfig.from_pretrained(folder, **_SAFE)
    spread = spread_over(device)
    scheme = scheme_of(folder)
    if scheme is None:
        model, report = _from_pretrained(_auto_class(folder, config), folder, dtype, spread)
    else:
        refuse_spread(device, "a quantized model")
        model, report = load_quantized(_auto_class(folder, config), folder, config, scheme, dtype)
    check_weights(folder, report)
    if layout.adapter is not None:
        from jupyter_llmcloud.inference.engines.adapters import merged

        model = merged(model, layout.adapter)
    check_finite(layout.adapter or folder, model)
    check_vocabulary(layout.tokenizer, model, tokenizer)
    return loaded_of(folder, (model if spread else model.to(device)).eval(), config, tokenizer)


def spread_over(device: str) -> dict[str, Any]:
    """What `from_pretrained` is given to spread a model over several GPUs; nothing for one device."""
    numbers = [int(number) for number in device.partition(":")[2].split(",") if number]
    if len(numbers) < 2:
        return {}
    import torch

    free = {number: int(torch.cuda.mem_get_info(number)[0] * _FOR_WEIGHTS) for number in numbers}
    return {"device_map": "balanced", "max_memory": free}


def loaded_of(name: str | Path, model: Any, config: Any, tokenizer: Any) -> LoadedModel:
    """A model in eval mode with its tokenizer, as one that generates. Raises ModelError when it is an encoder."""
    check_causal(name, model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        context_length=_context_length(config, tokenizer),
        num_vocabulary=model.get_input_embeddings().weight.shape[0],
        eos=_eos(model, tokenizer),
        is_encoder_decoder=bool(config.is_encoder_decoder),
    )


def refuse_spread(device: str, what: str) -> None:
    """Raise ModelError where a device is several."""
    if "," in device:
        raise ModelError(
            f"--devices {device.count(',') + 1}: only text generators of transformers are spread over several GPUs, "
            f"and this is {what}: serve it with --devices 1."
        )


def _check_architecture(folder: Path) -> None:
    """Refuse by name, before weights are read, what generates no text or is not known."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = json.loads((folder / "config.json").read_bytes())
    kind = config.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder} could not be loaded: its model_type {kind!r} is no architecture of the transformers that is "
            f"installed ({transformers.__version__}), and code from a model's folder is never run. "
            "Serve a model of a known architecture, or install a newer transformers."
        )
    for name in config.get("architectures") or ():
        known: Any = getattr(transformers, str(name), None)
        if hasattr(known, "can_generate") and not known.can_generate():
            raise ModelError(
                f"{folder} holds a {name}, which has no head that generates text. "
                "Serve a causal language model (...ForCausalLM) or an encoder-decoder (...ForConditionalGeneration)."
            )


def _auto_class(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        names = ", ".join(config.architectures or [config.model_type])
        raise ModelError(f"{folder} holds a {names}, which does not generate text from text.")
    return auto


def _from_pretrained(auto: Any, folder: Path, dtype: str, spread: Mapping[str, Any]) -> Any:
    # Shapes that do not fit are told by name afterwards: the library's own error says "see the report above".
    report = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options: dict[str, Any] = {**_SAFE, **report, **spread, "dtype": dtype}
    try:
        return auto.from_pretrained(folder, attn_implementation="sdpa", **options)
    except ValueError as error:
        log.info("%s: without scaled_dot_product_attention (%s)", folder.name, error)
        return auto.from_pretrained(folder, **options)


def _context_length(config: Any, tokenizer: Any) -> int:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = getattr(tokenizer, "model_max_length", None)
    return limit if isinstance(limit, int) and 0 < limit < 10_000_000 else _DEFAULT_CONTEXT


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(item) for item in value)
    return frozenset(token for token in found if token >= 0)


def defaults_for_sampling(folder: str | Path) -> dict[str, float]:
    """Temperature, top_p and top_k that generation_config.json recommends, when it recommends to sample."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return {}
    recommended = json.loads(path.read_text())
    if not recommended.get("do_sample"):
        return {}
    names = ("temperature", "top_p", "top_k")
    return {name: recommended[name] for name in names if isinstance(recommended.get(name), (int, float))}
