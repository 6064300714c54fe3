"""Any module as a text generator: its forward gives the scores of the next token, and nothing else is asked of it.

Such a module has no `generate` and no cache of keys and values, so each token is computed from the whole sequence. It
is believed only when it shows that it is one: scores as wide as its vocabulary, which no later token changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.inference.engines.loading import LoadedModel

LONGEST = 2048  # tokens that are tried, where neither the module nor the tokenizer tells how many it takes
_LENGTHS = (12, 5)
_CHANGED_FROM = 8
# How much scores may change with later tokens, relative to what those tokens change themselves: rounding, and no more.
_LEAK = {torch.float32: 1e-4}
_OTHER_LEAK = 3e-2
_NAMES_OF_LENGTH = (
    "block_size", "context_length", "max_position_embeddings", "max_seq_len", "max_seq_length", "max_sequence_length",
    "n_positions", "n_ctx", "ctx_len", "seq_len", "max_len", "max_length",
)  # fmt: skip


class NotAGenerator(ModelError):
    """A module whose forward does not give the scores of a next token; the text says what it gives."""


class CausalModuleConfig(PreTrainedConfig):
    """What transformers' `generate` asks of a model."""

    model_type = "llmcloud-causal-module"
    vocab_size: int = 0


class CausalModule(PreTrainedModel, GenerationMixin):
    """A module with the face of a model of transformers.

    Args:
        config: with `vocab_size`.
        module: takes token ids of shape (1, length) as its first argument, and gives scores of shape (1, length,
            vocabulary), or (1, 1, vocabulary) for the last position alone.
    """

    config_class = CausalModuleConfig
    main_input_name = "input_ids"

    def __init__(self, config: CausalModuleConfig, module: torch.nn.Module) -> None:
        super().__init__(config)
        self.module = module
        self.generation_config.use_cache = False

    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, last_only: bool = False, **_: Any
    ) -> CausalLMOutput:
        """Scores of every position; of the last one only with `last_only`. Cache and mask are not used."""
        scores = _scores(self.module, input_ids)
        length = input_ids.shape[1]
        if scores.shape[1] != length and not last_only:
            earlier = [_scores(self.module, input_ids[:, :end]) for end in range(1, length)]
            scores = torch.cat([*earlier, scores], dim=1)
        return CausalLMOutput(logits=scores)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The whole sequence: there is no cache."""
        return {"input_ids": input_ids, "last_only": True}

    def get_input_embeddings(self) -> Any:
        """Of the module, where it says so."""
        own = getattr(self.module, "get_input_embeddings", None)
        if not callable(own):
            raise NotImplementedError(f"{type(self.module).__name__} does not tell its embeddings")
        return own()


def as_generator(module: torch.nn.Module, tokenizer: Any, max_length: int = LONGEST) -> LoadedModel:
    """A module in eval mode, and its tokenizer, as a model that is generated with.

    Raises:
        NotAGenerator: when forward does not take token ids alone, when what it gives are no scores of a vocabulary, or
            when scores depend on later tokens.
    """
    name = type(module).__name__
    num_tokens = _num_tokens(tokenizer, name)
    device = next(module.parameters()).device
    try:
        with torch.inference_mode():
            found = [_scores(module, _ids(length, num_tokens, device)) for length in _LENGTHS]
    except NotAGenerator:
        raise
    except Exception as error:  # code of the user's own
        raise NotAGenerator(
            f"{name}.forward(ids) does not take the ids of {_LENGTHS[0]} and of {_LENGTHS[1]} tokens alone: "
            f"{type(error).__name__}: {error}"
        ) from error
    num_scores = _check_shapes(module, [tuple(scores.shape) for scores in found], num_tokens)
    wrapped = CausalModule(CausalModuleConfig(vocab_size=num_scores), module).eval()
    _check_causal(wrapped, num_tokens)
    length = _context_length(module, tokenizer, max_length)
    return LoadedModel(
        model=wrapped,
        tokenizer=tokenizer,
        context_length=length,
        num_vocabulary=num_tokens,
        eos=frozenset(_eos(module, tokenizer)),
        is_encoder_decoder=False,
    )


def _num_tokens(tokenizer: Any, name: str) -> int:
    """One more than the largest id that the tokenizer gives."""
    vocabulary = getattr(tokenizer, "get_vocab", None)
    ids = vocabulary().values() if callable(vocabulary) else ()
    if not ids:
        raise NotAGenerator(f"{name} has a {type(tokenizer).__name__} beside it, which makes no tokens of texts")
    return int(max(ids)) + 1


def _ids(length: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([[(7 * position + 3) % num_tokens for position in range(length)]], device=device)


def _scores(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What forward gives as logits: a tensor, `.logits`, or the first part of a tuple that could be them."""
    output: Any = module(ids)
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, torch.Tensor | tuple | list):
        output = getattr(output, "logits", None)
    parts = output if isinstance(output, tuple | list) else (output,)
    for part in parts:
        if isinstance(part, torch.Tensor) and part.ndim == 3 and part.is_floating_point():
            return part
    raise NotAGenerator(f"{type(module).__name__}.forward gives no scores (1, length, vocabulary): it gives no logits")


def _check_shapes(module: torch.nn.Module, shapes: list[tuple[int, ...]], num_tokens: int) -> int:
    """The width of the scores, when it is that of a vocabulary."""
    name = type(module).__name__
    num_scores = shapes[0][2]
    fits = all(
        shape in ((1, length, num_scores), (1, 1, num_scores)) for shape, length in zip(shapes, _LENGTHS, strict=True)
    )
    sizes = {num_tokens, *(part.num_embeddings for part in module.modules() if isinstance(part, torch.nn.Embedding))}
    if not fits or num_scores < num_tokens or num_scores not in sizes:
        raise NotAGenerator(
            f"{name}.forward gives {shapes[0]} for {_LENGTHS[0]} tokens, which are no scores of the {num_tokens} "
            "tokens of its tokenizer"
        )
    return num_scores


@torch.inference_mode()
def _check_causal(model: CausalModule, num_tokens: int) -> None:
    ids = _ids(_LENGTHS[0], num_tokens, model.device)
    changed = ids.clone()
    changed[0, _CHANGED_FROM:] = (changed[0, _CHANGED_FROM:] + 1) % num_tokens
    difference = (model(ids).logits[0].float() - model(changed).logits[0].float()).abs()
    before, after = float(difference[:_CHANGED_FROM].max()), float(difference[_CHANGED_FROM:].max())
    if before > _LEAK.get(model.dtype, _OTHER_LEAK) * after:
        raise NotAGenerator(
            f"{type(model.module).__name__} reads a text in both directions: its scores of a token depend on the "
            "tokens after it"
        )


def _context_length(module: torch.nn.Module, tokenizer: Any, longest: int) -> int:
    """How many tokens forward takes: as the module or its tokenizer says, when that is true; else it is tried."""
    limit = getattr(tokenizer, "model_max_length", None)
    if isinstance(limit, int) and 1 < limit < 10_000_000:
        longest = min(longest, limit)
    told = next(_told_lengths(module), None)
    longest = longest if told is None else told
    if _takes(module, longest):
        return longest
    shortest = _LENGTHS[0]  # this one is known to be taken
    while longest - shortest > 1:
        middle = (shortest + longest) // 2
        shortest, longest = (middle, longest) if _takes(module, middle) else (shortest, middle)
    return shortest


def _told_lengths(module: torch.nn.Module) -> Iterator[int]:
    config: Any = getattr(module, "config", None)
    known = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name in _NAMES_OF_LENGTH:
        for value in (known.get(name), getattr(module, name, None)):
            if isinstance(value, int) and not isinstance(value, bool) and value >= _LENGTHS[0]:
                yield value


@torch.inference_mode()
def _takes(module: torch.nn.Module, length: int) -> bool:
    try:
        _scores(module, torch.zeros((1, length), dtype=torch.long, device=next(module.parameters()).device))
    except Exception:  # positions that it does not have: an IndexError, an assertion, a shape that does not fit
        return False
    return True


def _eos(module: torch.nn.Module, tokenizer: Any) -> Iterator[int]:
    own = getattr(getattr(module, "config", None), "eos_token_id", None)
    for value in (tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else (own,))):
        if isinstance(value, int) and value >= 0:
            yield value
