"""A model taught by a larger one on the ranks: it learns the teacher's distribution of each next token.

Hinton et al. 2015 (Distilling the Knowledge in a Neural Network) with a temperature of 1: the Kullback-Leibler
divergence of the student's distribution from the teacher's, averaged over all tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.training.saved_model import no_progress_bars

_BATCH = 8  # windows of all ranks together
_LONGEST = 256
_RATE_OF, _RATE = 5e6, 1e-3  # learning rate of a model with so many weights; it falls with the root of their number
_WARMUP = 0.05
_CLIP = 1.0


def distill(run: Any, student: str, teacher: str, texts: str, num_steps: int) -> tuple[Any, Any]:
    """The student, trained, and its tokenizer. Every rank calls it.

    Args:
        run: of the cell: is told the loss and how far it is.
        student, teacher: folders of models with the same tokenizer.
        texts: a file with JSON, a list of texts.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    set_seed(1)
    with no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(student, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(student, local_files_only=True, dtype=torch.float32)
        teaching = AutoModelForCausalLM.from_pretrained(teacher, local_files_only=True, dtype=torch.float32).eval()
    accelerator = Accelerator()
    per_rank = max(1, _BATCH // accelerator.num_processes)
    least = per_rank * accelerator.num_processes
    rows = _rows(json.loads(Path(texts).read_bytes()), tokenizer, _context(model, teaching), least)
    loader: Any = DataLoader(rows, batch_size=per_rank, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    rate = _RATE * min(1.0, (_RATE_OF / model.num_parameters()) ** 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARMUP * num_steps), num_steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    teaching = teaching.to(accelerator.device)
    model.train()
    step = 0
    while step < num_steps:
        for batch in loader:
            loss = divergence(model(input_ids=batch).logits, _scores(teaching, batch))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            run.log(loss=loss.item(), step=step)
            run.progress(step, num_steps)
            if step >= num_steps:
                break
    return accelerator.unwrap_model(model).eval(), tokenizer


def divergence(scores: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """In nats a token: of the distributions that [..., vocabulary] scores stand for.

    Models of one tokenizer may have scores for more tokens than it has, filled up to a round number of their own.
    """
    width = min(scores.shape[-1], taught.shape[-1])
    scores, taught = scores[..., :width], taught[..., :width]
    flat, wanted = (value.float().flatten(0, -2).log_softmax(dim=-1) for value in (scores, taught))
    return torch.nn.functional.kl_div(flat, wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def _scores(teacher: Any, batch: torch.Tensor) -> torch.Tensor:
    scores: torch.Tensor = teacher(input_ids=batch).logits
    return scores


def _context(*models: Any) -> int:
    known = (getattr(model.config.get_text_config(), "max_position_embeddings", _LONGEST) for model in models)
    return min(_LONGEST, *known)


def _rows(texts: list[str], tokenizer: Any, length: int, least: int) -> torch.Tensor:
    """The tokens of the texts as at least so many windows of equal length. Raises ModelError when there are too few."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [token for text in texts for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], *end)]
    length = min(length, max(2, len(tokens) // least))
    count = len(tokens) // length
    if count < least:
        raise ModelError(
            f"the text to learn from has {len(tokens)} tokens, and {least} windows need more: --text FILE."
        )
    return torch.tensor(tokens[: count * length]).view(count, length)
