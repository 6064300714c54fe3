"""What %explain gives: scores to use in code and to look at, and tables of a model that was tried."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from jupyter_llmcloud.core.explain import robustness
from jupyter_llmcloud.core.explain.robustness import OutsideInputs, TriedInputs
from jupyter_llmcloud.core.explain.tokens import is_complete, strongest, visible
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.understand import pictures
from jupyter_llmcloud.protocol.explanation import Attribution, ExplainedModel, TriedModel

_TOLD = 8  # parts in the table


class Explanation:
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
    def table(self) -> Table:
        """The strongest parts."""
        total = sum(map(abs, self.scores if self.tokens else self.answers[0].scores))
        rows = [
            (visible(part), f"{score:+.3g}", f"{abs(score) / total:.0%}") for part, score in self.strongest() if total
        ]
        return Table(["part", "score", "of all"], rows, "No part of the input changes the answer.")

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
        lines = [told, shown(f"{source[0].upper()}{source[1:]}. {self._sum_in_words()}")]
        if len(self.answers) > pictures.MAX_ROWS and first.tokens:
            lines.append(f"The first {pictures.MAX_ROWS} of {len(self.answers)} tokens are drawn; all are in .answers.")
        return lines

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

    def __repr__(self) -> str:
        return "\n".join([*self.lines, repr(self.table)])

    def _repr_html_(self) -> str:
        first = self.answers[0]
        image = pictures.pixels_image(first) if first.shape else pictures.tokens_image(self.answers)
        key = "Orange speaks for the answer, blue against it." if image else ""
        above = "".join(f"<div>{html.escape(line)}</div>" for line in [*self.lines, *([key] if key else [])])
        return f"{above}<div>{image}</div>{self.table._repr_html_()}"


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


class Robustness:
    """How a model stood inputs that were changed.

    Attributes:
        model: what was tried on what.
        changes: a row for each change, the data as they are first.
        outside: a row for each other kind of input, the data first.
    """

    def __init__(self, model: TriedModel, changes: Sequence[TriedInputs], outside: Sequence[OutsideInputs]) -> None:
        self.model = model
        self.changes = list(changes)
        self.outside = list(outside)

    @property
    def table(self) -> Table:
        """Each change beside the data as they are."""
        return Table(robustness.headings(self.changes), robustness.table(self.changes), "Nothing was tried.")

    @property
    def outside_table(self) -> Table:
        """What it says of inputs of another kind."""
        return Table(robustness.outside_headings(self.outside), robustness.outside_table(self.outside), "")

    @property
    def lines(self) -> list[str]:
        """What the figures are of."""
        source = f" ({self.model.source})" if self.model.source else ""
        return [shown(f"{self.model.name}{source}: {self.model.caption}.")]

    def __repr__(self) -> str:
        return "\n".join([*self.lines, repr(self.table), "", repr(self.outside_table)])

    def _repr_html_(self) -> str:
        above = "".join(f"<div>{html.escape(line)}</div>" for line in self.lines)
        return above + self.table._repr_html_() + self.outside_table._repr_html_()
