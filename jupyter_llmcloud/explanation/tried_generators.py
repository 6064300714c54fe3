"""A model that generates, given a text whose first half is spoilt: how well does it still know the second half?

A typo is unlikely by itself, so the likelihood of a spoilt text says little. What is compared is the likelihood of the
same, unchanged second half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jupyter_llmcloud.core.explain.changes import TEXT_CHANGES, changed
from jupyter_llmcloud.core.explain.robustness import OutsideInputs, TriedInputs
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.explanation.tried_rows import read_rows, tell_header, tell_row
from jupyter_llmcloud.explanation.tried_texts import outside_texts
from jupyter_llmcloud.inference.openai.prompts import text_to_continue
from jupyter_llmcloud.protocol.explanation import TryRequest
from jupyter_llmcloud.protocol.model_work import Tell, WorkProgress

LONGEST = 512  # tokens of a text that are looked at
_SHORTEST = 16  # characters that can be cut in two
_AT_ONCE = 16


@dataclass(frozen=True)
class ScoredText:
    """A text as a model finds it.

    Attributes:
        loss: minus the log-probability of its tokens, all together.
        num_tokens: of those.
        first: the token that it would have begun with.
    """

    loss: float
    num_tokens: int
    first: int


def try_generator(opened: OpenedModel, request: TryRequest, tell: Tell) -> None:
    """The tables of a model that generates."""
    if opened.is_encoder_decoder:
        raise UsageError(f"%explain {opened.name} --adversarial: it is an encoder with a decoder, which is not tried.")
    texts = [str(row["text"]) for row in read_rows(request, "text")]
    halves = [half for text in texts if (half := cut(text)) is not None]
    if not halves:
        raise UsageError(f"--adversarial {request.told}: no text is long enough to be cut in two.")
    firsts, seconds = [first for first, _ in halves], [second for _, second in halves]
    caption = (
        f"the second half, as it is, of {len(halves)} texts of {request.told} (up to {_room(opened)} tokens), after "
        f"their first half; changes by seed {request.seed}"
    )
    tell_header(opened, caption, tell)
    before = scored(opened, firsts, seconds)
    tell_row(_compared("as they are", before, before), tell)
    for name, change in TEXT_CHANGES.items():
        tell(WorkProgress(text=f"{opened.name}: {name}"))
        tell_row(_compared(name, scored(opened, changed(firsts, change, request.seed), seconds), before), tell)
    tell_row(_outside(opened, "the data", texts), tell)
    for what, others in outside_texts(request, texts):
        tell_row(_outside(opened, what, others), tell)


def cut(text: str) -> tuple[str, str] | None:
    """A text in two, before the space that is nearest to its middle; None for one that is too short."""
    middle = len(text) // 2
    places = [place for place, char in enumerate(text) if char == " " and 0 < place < len(text) - 1]
    if len(text) < _SHORTEST or not places:
        return None
    place = min(places, key=lambda place: abs(place - middle))
    return text[:place], text[place:]


def _room(opened: OpenedModel) -> int:
    return min(LONGEST, opened.context_length)


def scored(opened: OpenedModel, firsts: Sequence[str], seconds: Sequence[str]) -> list[ScoredText]:
    """The second halves, each after its first half. What is too long loses its beginning and its end."""
    rows = []
    half = _room(opened) // 2
    for first, second in zip(firsts, seconds, strict=True):
        before = text_to_continue(first, opened.tokenizer)[-half:] or [_start(opened)]
        after = opened.tokenizer(second, add_special_tokens=False)["input_ids"][: _room(opened) - half]
        rows.append((before, after))
    return _losses(opened, rows)


def _losses(opened: OpenedModel, rows: Sequence[tuple[list[int], list[int]]]) -> list[ScoredText]:
    found: list[ScoredText] = []
    for start in range(0, len(rows), _AT_ONCE):
        batch = rows[start : start + _AT_ONCE]
        length = max(len(before) + len(after) for before, after in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, (before, after) in enumerate(batch):  # padded behind, where a causal model does not look
            size = len(before) + len(after)
            ids[number, :size], mask[number, :size] = torch.tensor([*before, *after]), 1
        with torch.no_grad():
            logits = opened.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        for number, (before, after) in enumerate(batch):
            scores = logits[number, len(before) - 1 : len(before) + len(after) - 1].log_softmax(-1)
            loss = -scores.gather(1, torch.tensor(after)[:, None]).double().sum()
            found.append(ScoredText(float(loss), len(after), int(logits[number, len(before) - 1].argmax())))
    return found


def _compared(change: str, now: Sequence[ScoredText], before: Sequence[ScoredText]) -> TriedInputs:
    pairs = list(zip(now, before, strict=True))
    least = 1e-4  # what rounding makes of one and the same text
    return TriedInputs(
        change,
        len(now),
        num_other=sum(one.first != was.first for one, was in pairs),
        perplexity=math.exp(min(700.0, sum(one.loss for one in now) / sum(one.num_tokens for one in now))),
        num_worse=sum(one.loss > was.loss * (1 + least) for one, was in pairs),
        num_better=sum(one.loss < was.loss * (1 - least) for one, was in pairs),
    )


def _outside(opened: OpenedModel, what: str, texts: Sequence[str]) -> OutsideInputs:
    """Bits for each byte: of texts whose tokens are of different lengths, too."""
    start = [_start(opened)]
    rows, num_bytes = [], 0
    for text in texts:
        ids = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
        kept = ids[: _room(opened) - 1]
        if not kept:
            continue
        rows.append((start, kept))
        whole = len(text.encode("utf-8", "replace"))
        num_bytes += whole if len(kept) == len(ids) else len(opened.tokenizer.decode(kept).encode("utf-8", "replace"))
    losses = _losses(opened, rows)
    bits = sum(row.loss for row in losses) / math.log(2) / max(1, num_bytes)
    return OutsideInputs(what, len(rows), bits_per_byte=bits)


def _start(opened: OpenedModel) -> int:
    """What a text begins with: its first token is scored, too."""
    for ident in (opened.tokenizer.bos_token_id, opened.tokenizer.eos_token_id):
        if ident is not None:
            return int(ident)
    return 0
