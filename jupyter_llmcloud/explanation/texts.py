"""Why a model of texts answers so: scores of the tokens of what it was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from jupyter_llmcloud.core.options import did_you_mean
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.explanation.attribution import (
    ABLATION,
    GRADIENTS,
    PartScores,
    ablation,
    integrated_gradients,
    log_odds,
)
from jupyter_llmcloud.explanation.models import OpenedModel
from jupyter_llmcloud.inference.open_inference.classifiers.scores import MULTI, Labels
from jupyter_llmcloud.inference.open_inference.classifiers.text import max_length
from jupyter_llmcloud.inference.openai.prompts import text_to_continue
from jupyter_llmcloud.protocol.explanation import Attribution, ExplainedModel, ExplainRequest
from jupyter_llmcloud.protocol.model_work import Tell, WorkProgress

log = logging.getLogger(__name__)

_SMALL = 0.2  # of the usual size of an embedding
_SAMPLED = 4096  # embeddings that a mean is of, spread over all
_INPUTS = ("attention_mask", "token_type_ids")


class TextExplainer:
    """Scores of tokens, by their embeddings where the model takes such, else by their ids.

    Args:
        opened: a generator, a classifier or a regressor of texts.
        method: as asked for; "": what the model takes.
        steps: of the integral, at first.
    """

    def __init__(self, opened: OpenedModel, method: str, steps: int) -> None:
        self.opened = opened
        self.by_embeddings = opened.has_embeddings
        self._asked = method
        self._steps = steps
        self._empty = _empty_token(opened)

    @property
    def method(self) -> str:
        """How scores are found."""
        return self._asked or (GRADIENTS if self.by_embeddings else ABLATION)

    def prepare(self, ids: list[int], forward: Callable[..., torch.Tensor]) -> None:
        """See whether the model computes the same of embeddings as of ids: not all do. Raises UsageError."""
        if self.by_embeddings:
            self.by_embeddings = self._is_alike(torch.tensor([ids]), forward)
        if self._asked == GRADIENTS and not self.by_embeddings:
            raise UsageError(
                f"%explain {self.opened.name}: the model takes ids of tokens, and computes something else (or nothing) "
                f"of their embeddings, so that there is no gradient. Use --method {ABLATION}."
            )
        if self._empty is None and not self.by_embeddings:
            self._empty = 0

    def _is_alike(self, ids: torch.Tensor, forward: Callable[..., torch.Tensor]) -> bool:
        try:
            with torch.no_grad():
                by_ids = forward(input_ids=ids)
                by_embeddings = forward(inputs_embeds=self.opened.model.get_input_embeddings()(ids))
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            log.info("%s takes no embeddings: %s", self.opened.name, error)
            return False
        return bool(torch.allclose(by_ids, by_embeddings, rtol=1e-3, atol=1e-3))

    @property
    def baseline(self) -> str:
        """In words."""
        if self._empty is None:
            return "the mean of the embeddings"
        return f"the token {self.opened.tokenizer.convert_ids_to_tokens(self._empty)}"

    def scores(self, ids: list[int], forward: Callable[..., torch.Tensor], keeps: list[bool]) -> PartScores:
        """A score for each token.

        Args:
            ids: of the tokens.
            forward: called with `inputs_embeds` or `input_ids`, of several rows; a number for each.
            keeps: whether a token is also part of the baseline, as those are that every text has.
        """
        given, baseline, name = self._given(torch.tensor([ids]), keeps)

        def by_name(rows: torch.Tensor) -> torch.Tensor:
            return forward(**{name: rows})

        if self.method == GRADIENTS:
            found = integrated_gradients(by_name, given, baseline, self._steps)
        else:
            parts = torch.arange(len(ids)).view(1, -1, *[1] * (given.ndim - 2)).expand_as(given)
            found = ablation(by_name, given, baseline, parts.contiguous())
            whole = found.scores[..., 0] if given.ndim == 3 else found.scores  # all of an embedding has its token's
            return replace(found, scores=torch.where(torch.tensor([keeps]), torch.zeros_like(whole), whole))
        return replace(found, scores=found.scores.sum(-1))

    def _given(self, ids: torch.Tensor, keeps: list[bool]) -> tuple[torch.Tensor, torch.Tensor, str]:
        kept = torch.tensor([keeps])
        if not self.by_embeddings:
            return ids, torch.where(kept, ids, torch.full_like(ids, self._empty or 0)), "input_ids"
        embed = self.opened.model.get_input_embeddings()
        with torch.no_grad():
            given = embed(ids).detach()
            if self._empty is None:
                some = torch.linspace(0, embed.weight.shape[0] - 1, min(_SAMPLED, embed.weight.shape[0])).long()
                empty = embed(some).mean(0).expand_as(given)
            else:
                empty = embed(torch.full_like(ids, self._empty)).detach()
        return given, torch.where(kept[..., None], given, empty), "inputs_embeds"


def _empty_token(opened: OpenedModel) -> int | None:
    """The id of a token that says nothing; None where there is none with an embedding of some size.

    A padding token is often zeros. From there the way is a bad one: a model normalises what it reads, so that near zero
    all of its answer is made within a step that no sum over steps finds.
    """
    kinds = ("mask", "pad", "unk", "eos", "bos")
    known = [getattr(opened.tokenizer, f"{kind}_token_id", None) for kind in kinds]
    idents = [int(ident) for ident in known if ident is not None]
    if not opened.has_embeddings:
        return next(iter(idents), None)
    sizes = opened.model.get_input_embeddings().weight.detach().float().norm(dim=1)
    return next((ident for ident in idents if sizes[ident] > _SMALL * sizes.median()), None)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token is as text; a token that is a part of a character, as the tokenizer writes it."""
    found = []
    for ident, kept in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = tokenizer.decode([ident])
        raw = kept.decode("utf-8", "replace") if isinstance(kept, bytes) else str(kept)
        if "�" in text:
            text = raw
        elif raw.startswith("▁") and not text.startswith(" "):
            text = f" {text}"
        found.append(text)
    return found


# --- models that generate ---


def explain_generator(opened: OpenedModel, request: ExplainRequest, tell: Tell) -> None:
    """Each token of the answer, by all that stand before it."""
    explainer = TextExplainer(opened, request.method, request.steps)
    prompt = _prompt(opened, request.text)
    answer = _answer(opened, prompt, request)
    explainer.prepare(prompt, _next_token(opened, [], answer[0]))
    tell(_told(explainer, opened.tokenizer.decode(answer)))
    shown = pieces(opened.tokenizer, [*prompt, *answer])
    special = set(opened.tokenizer.all_special_ids)
    for number, token in enumerate(answer):
        tell(WorkProgress(text=f"{opened.name}: token {number + 1} of {len(answer)}"))
        before = answer[:number]
        ids = prompt if opened.is_encoder_decoder else [*prompt, *before]
        keeps = [ident in special and place < len(prompt) for place, ident in enumerate(ids)]
        found = explainer.scores(ids, _next_token(opened, before, token), keeps)
        tell(
            _attribution(
                shown[len(prompt) + number],
                "log-probability of the token",
                found,
                shown[: len(ids)],
                probability=min(1.0, float(torch.tensor(found.value).exp())),
                num_given=len(prompt),
            )
        )


def _prompt(opened: OpenedModel, text: str) -> list[int]:
    tokenizer = opened.tokenizer
    whole = opened.is_encoder_decoder  # which reads a text with its end
    ids = [int(ident) for ident in (tokenizer(text)["input_ids"] if whole else text_to_continue(text, tokenizer))]
    if not ids:
        raise UsageError(f"%explain {opened.name}: the text has no tokens: give one that is not empty.")
    return ids


def _answer(opened: OpenedModel, prompt: list[int], request: ExplainRequest) -> list[int]:
    room = opened.context_length - (0 if opened.is_encoder_decoder else len(prompt))
    if room < 1:
        raise UsageError(
            f"%explain {opened.name}: the text has {len(prompt)} tokens, and the model takes {opened.context_length} "
            "together with what it answers: shorten it."
        )
    if request.answer:
        answer = [int(ident) for ident in opened.tokenizer(request.answer, add_special_tokens=False)["input_ids"]]
        if not 0 < len(answer) <= room:
            raise UsageError(
                f"%explain {opened.name}: --answer has {len(answer)} tokens, and there is room for {room}."
            )
        return answer
    answer = []
    while len(answer) < min(request.num_new, room):
        ids = prompt if opened.is_encoder_decoder else [*prompt, *answer]
        with torch.no_grad():
            answer.append(int(_logits(opened, answer)(input_ids=torch.tensor([ids]))[0].argmax()))
        if answer[-1] in opened.eos:
            break
    return answer


def _next_token(opened: OpenedModel, before: list[int], token: int) -> Callable[..., torch.Tensor]:
    scores = _logits(opened, before)
    return lambda **rows: scores(**rows).log_softmax(-1)[:, token]


def _logits(opened: OpenedModel, before: list[int]) -> Callable[..., torch.Tensor]:
    """The scores of the next token, of several rows: a number for each of the vocabulary."""

    def forward(**given: torch.Tensor) -> torch.Tensor:
        [rows] = given.values()
        options: dict[str, Any] = {"attention_mask": torch.ones(rows.shape[:2], dtype=torch.long), "use_cache": False}
        if opened.is_encoder_decoder:
            options["decoder_input_ids"] = torch.tensor([[_start(opened), *before]]).expand(len(rows), -1)
        return opened.model(**given, **options).logits[:, -1].float()

    return forward


def _start(opened: OpenedModel) -> int:
    """What the decoder begins with."""
    for config in (opened.model.generation_config, opened.model.config):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(start)
    return 0


# --- classifiers and regressors ---


def explain_classifier(opened: OpenedModel, request: ExplainRequest, tell: Tell) -> None:
    """One label, by the tokens of the text."""
    explainer = TextExplainer(opened, request.method, request.steps)
    encoding = opened.tokenizer(request.text, return_special_tokens_mask=True)
    ids = [int(ident) for ident in encoding["input_ids"]]
    limit = max_length(opened.model, opened.tokenizer)
    if not 0 < len(ids) <= limit:
        raise UsageError(f"%explain {opened.name}: the text has {len(ids)} tokens, and the model takes 1 to {limit}.")
    others = {name: torch.tensor([encoding[name]]) for name in _INPUTS if name in encoding}

    def logits(**given: torch.Tensor) -> torch.Tensor:
        [rows] = given.values()
        beside = {name: value.expand(len(rows), -1) for name, value in others.items()}
        return opened.model(**given, **beside).logits.float()

    with torch.no_grad():
        row = logits(input_ids=torch.tensor([ids]))[0]
    labels = Labels.of(opened.model.config, opened.kind)
    label = chosen_label(labels, request.label, row, opened.name)
    quantity, number = measured(labels, label)
    keeps = [bool(mark) for mark in encoding["special_tokens_mask"]]
    explainer.prepare(ids, lambda **given: number(logits(**given)))
    tell(_told(explainer))
    found = explainer.scores(ids, lambda **given: number(logits(**given)), keeps)
    tell(
        _attribution(
            "" if labels.problem == "regression" else labels.names[label],
            quantity,
            found,
            pieces(opened.tokenizer, ids),
            probability=probability(labels, row, label),
            num_given=len(ids),
        )
    )


def chosen_label(labels: Labels, asked: str, row: torch.Tensor, model: str) -> int:
    """The number of the label that is explained. Raises UsageError when there is none of that name."""
    if not asked:
        return int(row.argmax())
    if asked in labels.names:
        return labels.names.index(asked)
    if asked.isdigit() and int(asked) < len(labels.names):
        return int(asked)
    known = ", ".join(labels.names[:20])
    raise UsageError(
        f"%explain {model}: --label {asked!r} is none of its labels: {known}.{did_you_mean(asked, labels.names)}"
    )


def measured(labels: Labels, label: int) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What is explained of the logits, in words and as a function."""
    if labels.problem == "regression":
        return "predicted number", lambda logits: logits[:, label]
    name = labels.names[label]
    if labels.problem == MULTI or len(labels.names) == 1:
        return f"log-odds of {name}", lambda logits: logits[:, label]
    return f"log-odds of {name}", lambda logits: log_odds(logits, label)


def probability(labels: Labels, row: torch.Tensor, label: int) -> float | None:
    """Of a label; None of a predicted number."""
    if labels.problem == "regression":
        return None
    return float(labels.scores(row.detach().numpy())[label])


def _told(explainer: TextExplainer, answer: str = "") -> ExplainedModel:
    opened = explainer.opened
    return ExplainedModel(
        name=opened.name,
        kind=opened.kind,
        method=explainer.method,
        baseline=explainer.baseline,
        source=opened.source,
        answer=answer,
    )


def _attribution(answer: str, quantity: str, found: PartScores, tokens: list[str], **more: Any) -> Attribution:
    return Attribution(
        answer=answer,
        quantity=quantity,
        value=found.value,
        baseline_value=found.baseline_value,
        tokens=tokens,
        scores=[float(score) for score in found.scores.flatten()],
        difference=found.difference,
        steps=found.steps,
        **more,
    )
