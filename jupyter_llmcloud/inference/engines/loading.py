"""A Hugging Face folder to a model that is safe to serve: safetensors only, never code from the folder."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import ModelError

log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEFAULT_CONTEXT = 2048
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
)


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
    """

    model: Any
    tokenizer: Any
    context_length: int
    num_vocabulary: int
    eos: frozenset[int]
    is_encoder_decoder: bool

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_model(folder: str | Path, *, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Load the model in `folder`; raises `ModelError` with what is missing or wrong.

    Args:
        folder: config.json, *.safetensors and a tokenizer, as `save_pretrained` writes them.
        dtype: "auto" takes the checkpoint's own.
        device: "cpu", "cuda:0", ...
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known: use one of {', '.join(_DTYPES)}.")
    folder = Path(folder)
    check_folder(folder)
    try:
        return _load(folder, dtype, device)
    except ModelError:
        raise
    except Exception as error:
        # Much code of others runs here on files of others: whatever it raises is about this folder.
        raise ModelError(f"{folder} could not be loaded: {type(error).__name__}: {error}") from error


def check_folder(folder: Path) -> None:
    """Raise `ModelError` unless `folder` seems a whole model in safetensors; looks at file names only."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder. Give the folder that save_pretrained() wrote.")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), not a whole model. "
            "Save model.merge_and_unload() with save_pretrained() and serve that folder."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json. Save the model with model.save_pretrained(folder).")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no *.safetensors file{_pickles(folder)}. Only safetensors are loaded, since other "
            "formats can run code: save the model again with model.save_pretrained(folder)."
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer. Save it with tokenizer.save_pretrained(folder).")


def _pickles(folder: Path) -> str:
    found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    return f" (it has {', '.join(found[:3])})" if found else ""


def _load(folder: Path, dtype: str, device: str) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **safe)
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, report = _from_pretrained(kind, folder, {**safe, "dtype": dtype})
    _check_weights(folder, report)
    _check_finite(folder, model)
    model = model.to(device).eval()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        context_length=_context_length(config, tokenizer),
        num_vocabulary=model.get_input_embeddings().weight.shape[0],
        eos=_eos(model, tokenizer),
        is_encoder_decoder=bool(config.is_encoder_decoder),
    )


def _from_pretrained(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    options = {**options, "use_safetensors": True, "output_loading_info": True}
    try:
        return kind.from_pretrained(folder, attn_implementation="sdpa", **options)
    except ValueError as error:
        log.info("%s: without scaled_dot_product_attention (%s)", folder.name, error)
        return kind.from_pretrained(folder, **options)


def _check_weights(folder: Path, report: dict[str, Any]) -> None:
    missing = sorted(str(key) for key in report.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}), so it would "
            "answer with random ones. Save the whole model with its language-model head."
        )


def _check_finite(folder: Path, model: Any) -> None:
    broken = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        raise ModelError(
            f"{folder}: {len(broken)} of the model's weights have NaN or infinite values ({', '.join(broken[:3])}), "
            "so every answer would be nonsense. Serve a checkpoint from before the loss diverged."
        )


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
