"""Whether a model that could be loaded makes sense: else it would be served as ready, and answer nonsense."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jupyter_llmcloud.errors import ModelError

_MOST_NAMED = 3
_LENGTH = 12
_CHANGED_FROM = 8
# How much the scores of a token may depend on those after it, relative to those tokens' own scores. A causal model
# gives exactly 0, but for the rounding of experts that get other batches; the tiniest encoder in float32 gives 2e-3.
_LEAKS = {"float32": 1e-4, "encoder": 1e-3, "other": 3e-2}


def check_weights(folder: Path, report: dict[str, Any]) -> None:
    """Raise ModelError unless the files hold the weights that the configuration describes: no fewer, and no others."""
    missing = sorted(map(str, report.get("missing_keys") or ()))
    unknown = sorted(map(str, report.get("unexpected_keys") or ()))
    misfits = sorted(report.get("mismatched_keys") or ())
    said = []
    if missing:
        said.append(f"lacks {len(missing)} of the model's weights ({_first(missing)}), which would be random numbers")
    if unknown:
        said.append(f"holds {len(unknown)} weights that its config.json does not know ({_first(unknown)})")
    if misfits:
        shapes = [f"{name}: {tuple(saved)}, not {tuple(wanted)}" for name, saved, wanted in misfits]
        said.append(f"holds {len(misfits)} weights of another shape than its config.json says ({_first(shapes)})")
    said += [str(error) for error in report.get("error_msgs") or ()]
    if said:
        raise ModelError(
            f"{folder} {'; it '.join(said)}. Its files and its config.json are not of one model: save the whole model, "
            "with its language-model head, by model.save_pretrained(folder)."
        )


def check_finite(folder: Path, model: Any) -> None:
    """Raise ModelError when weights are NaN or infinite."""
    broken = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        raise ModelError(
            f"{folder}: {len(broken)} of the model's weights have NaN or infinite values ({_first(broken)}), "
            "so every answer would be nonsense. Serve a checkpoint from before the loss diverged."
        )


def check_vocabulary(folder: str | Path, model: Any, tokenizer: Any) -> None:
    """Raise ModelError when the tokenizer is plainly not the one that the model was trained with.

    A vocabulary that is smaller than the model's is no sign of that: embeddings are padded to round sizes.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    beyond = sorted((token, text) for text, token in vocabulary.items() if token >= num_embeddings)
    if beyond:
        named = _first([f"{text!r} is {token}" for token, text in beyond])
        raise ModelError(
            f"{folder}: {len(beyond)} tokens of the tokenizer are beyond the model's {num_embeddings} embeddings "
            f"({named}). Save the tokenizer that the model was trained with; if tokens were added to it, call "
            "model.resize_token_embeddings(len(tokenizer)) before training."
        )
    known = set(vocabulary.values())
    for token in _ends(model.config):
        if token < num_embeddings and token not in known:
            raise ModelError(
                f"{folder}: the model ends a text with token {token} (eos_token_id in config.json), and the tokenizer "
                f"has no such token: it has {len(vocabulary)}. Save the tokenizer that the model was trained with."
            )
        if token in known - _control_tokens(tokenizer) and _says_otherwise(token, model.config, tokenizer):
            text = tokenizer.convert_ids_to_tokens(token)
            raise ModelError(
                f"{folder}: the model ends a text with token {token} (eos_token_id in config.json), which is an "
                f"ordinary {text!r} for the tokenizer, whose end is {tokenizer.eos_token_id} "
                f"({tokenizer.eos_token!r}). Save the tokenizer that the model was trained with."
            )


def _ends(config: Any) -> list[int]:
    ends = getattr(config.get_text_config(), "eos_token_id", None)
    return [token for token in (ends if isinstance(ends, list) else [ends]) if isinstance(token, int) and token >= 0]


def _control_tokens(tokenizer: Any) -> set[int]:
    return {*getattr(tokenizer, "added_tokens_decoder", {}), *tokenizer.all_special_ids}


def _says_otherwise(token: int, config: Any, tokenizer: Any) -> bool:
    """The tokenizer has another end. What a configuration has by default was often never meant."""
    own = config.get_text_config()
    return tokenizer.eos_token_id not in (None, token) and token not in _ends(type(own)())


def check_causal(folder: str | Path, model: Any) -> None:
    """Raise ModelError for an encoder: one whose scores of a token depend on the tokens after it.

    Tried, since configurations do not tell: `is_decoder` is false for GPT-NeoX too, and absent elsewhere.
    """
    import torch

    if model.config.is_encoder_decoder:
        return
    num_vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.tensor([[(7 * position + 3) % num_vocabulary for position in range(_LENGTH)]], device=model.device)
    changed = tokens.clone()
    changed[0, _CHANGED_FROM:] = (changed[0, _CHANGED_FROM:] + 1) % num_vocabulary
    with torch.inference_mode():
        scores, others = (model(input_ids=ids, use_cache=False).logits[0].float() for ids in (tokens, changed))
    difference = (scores - others).abs()
    before, after = float(difference[:_CHANGED_FROM].max()), float(difference[_CHANGED_FROM:].max())
    is_decoder = getattr(model.config, "is_decoder", None)
    precision = "float32" if model.dtype == torch.float32 else "encoder" if is_decoder is False else "other"
    if before > _LEAKS[precision] * after:
        hint = " (config.json says is_decoder: false)" if is_decoder is False else ""
        raise ModelError(
            f"{folder} holds an encoder: {type(model).__name__} reads a text in both directions{hint}, so it cannot "
            "generate one. Serve a causal language model, or train this one with is_decoder=True."
        )


def _first(names: Iterable[str]) -> str:
    named = list(names)
    return ", ".join(named[:_MOST_NAMED]) + (", ..." if len(named) > _MOST_NAMED else "")
