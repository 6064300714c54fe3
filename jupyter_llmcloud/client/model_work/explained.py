"""What was found of a model, in words and figures: for a notebook, which draws it too, and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jupyter_llmcloud.core.explain.tokens import is_complete, strongest, visible
from jupyter_llmcloud.protocol.explanation import Attribution, ExplainedModel, TriedModel

HEADINGS = ("part", "score", "of all")
_TOLD = 8  # parts in the table


class ExplainedAnswer:
    """Which parts of an input led to an answer.

    Attributes:
        model: what was explained, and how.
        answers: one for each token that was generated, or one: its tokens, scores, probability.
        tokens: what was asked, in tokens; empty for an array.
        scores: one for each token, of all answers together; of an array nested lists in its shape.
    """

    def __init__(self, model: ExplainedModel, answers: Sequence[Attribution]) -> None:
        self.model = model
        self.answers = list(answers)
        self.tokens = self.answers[0].tokens[: self.answers[0].num_given]
        self.scores: list[Any] = self._scores()

    def _scores(self) -> list[Any]:
        if self.answers[0].shape:
            return _nested(self.answers[0].scores, self.answers[0].shape)
        return [sum(answer.scores[at] for answer in self.answers) for at in range(len(self.tokens))]

    @property
    def answer(self) -> str:
        """What was answered: a label, or the text that was generated."""
        return self.model.answer or "".join(answer.answer for answer in self.answers)

    @property
    def difference(self) -> float:
        """By how much the scores miss what they add up to, all answers together; 0 for an ablation."""
        return sum(answer.difference for answer in self.answers)

    def strongest(self, count: int = _TOLD) -> list[tuple[str, float]]:
        """The parts that count most, for or against, each with its score."""
        if self.answers[0].shape:
            flat, names = self.answers[0].scores, _places(self.answers[0].shape)
            return [(names(number), flat[number]) for number in strongest(flat, count)]
        return [(self.tokens[number], self.scores[number]) for number in strongest(self.scores, count)]

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """The strongest parts, as the table has them."""
        total = sum(map(abs, self.scores if self.tokens else self.answers[0].scores))
        return [
            (visible(part), f"{score:+.3g}", f"{abs(score) / total:.0%}") for part, score in self.strongest() if total
        ]

    @property
    def lines(self) -> list[str]:
        """What was explained, how, and how good the scores are."""
        first = self.answers[0]
        if len(self.answers) > 1:
            told = f"{self.model.name} answers {_quoted(self.answer)}: scores for the log-probability of each token"
        else:
            sure = "" if first.probability is None else f" ({first.probability:.1%})"
            said = _quoted(first.answer) if first.answer else f"{first.value:.4g}"
            told = f"{self.model.name} answers {said}{sure}: scores for the {first.quantity}"
        how = f"by {self.model.method.replace('-', ' ')}, against {self.model.baseline}"
        source = f"{self.model.source}, {how}" if self.model.source else how
        return [told, f"{source[0].upper()}{source[1:]}. {self._sum_in_words()}"]

    def _sum_in_words(self) -> str:
        if self.model.method == "ablation":
            return "A score is what the answer loses without that part alone; they add up to nothing in particular."
        change = sum(answer.value - answer.baseline_value for answer in self.answers)
        if all(is_complete(a.difference, a.value - a.baseline_value) for a in self.answers):
            return f"They add up to {change:+.4g}, as they should."
        return (
            f"They should add up to {change:+.4g} and miss it by {self.difference:+.2g}, also with "
            f"{max(answer.steps for answer in self.answers)} steps: take them as rough, or --method ablation."
        )


def _quoted(text: str) -> str:
    seen = "".join(visible(char) if char != " " else " " for char in text)
    return f"“{seen if len(seen) <= 200 else seen[:199] + '…'}”"


def _nested(flat: Sequence[float], shape: Sequence[int]) -> list[Any]:
    if len(shape) < 2:
        return list(flat)
    size = len(flat) // shape[0]
    return [_nested(flat[at * size : (at + 1) * size], shape[1:]) for at in range(shape[0])]


def _places(shape: Sequence[int]) -> Any:
    """From the number of a score to where it is: `[3, 5]`."""

    def name(number: int) -> str:
        found = []
        for size in reversed(shape):
            number, place = divmod(number, size)
            found.append(place)
        return str(found[::-1])

    return name


def tried_in_words(model: TriedModel) -> str:
    """What the figures of a model that was tried are of."""
    source = f" ({model.source})" if model.source else ""
    return f"{model.name}{source}: {model.caption}."
