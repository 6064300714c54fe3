"""What %explain gives: scores to use in code and to look at, and tables of a model that was tried."""

from __future__ import annotations

import html
from collections.abc import Sequence

from jupyter_llmcloud.client.model_work.explained import HEADINGS, ExplainedAnswer, tried_in_words
from jupyter_llmcloud.core.explain import robustness
from jupyter_llmcloud.core.explain.robustness import OutsideInputs, TriedInputs
from jupyter_llmcloud.magics.commands.tables import Table
from jupyter_llmcloud.magics.output.shown_paths import shown
from jupyter_llmcloud.magics.understand import pictures
from jupyter_llmcloud.protocol.explanation import TriedModel


class Explanation(ExplainedAnswer):
    """Which parts of an input led to an answer, drawn in a notebook."""

    @property
    def table(self) -> Table:
        """The strongest parts."""
        return Table(HEADINGS, self.rows, "No part of the input changes the answer.")

    @property
    def lines(self) -> list[str]:
        """What was explained, how, and how good the scores are."""
        lines = [shown(line) for line in super().lines]
        if len(self.answers) > pictures.MAX_ROWS and self.answers[0].tokens:
            lines.append(f"The first {pictures.MAX_ROWS} of {len(self.answers)} tokens are drawn; all are in .answers.")
        return lines

    def __repr__(self) -> str:
        return "\n".join([*self.lines, repr(self.table)])

    def _repr_html_(self) -> str:
        first = self.answers[0]
        image = pictures.pixels_image(first) if first.shape else pictures.tokens_image(self.answers)
        key = "Orange speaks for the answer, blue against it." if image else ""
        above = "".join(f"<div>{html.escape(line)}</div>" for line in [*self.lines, *([key] if key else [])])
        return f"{above}<div>{image}</div>{self.table._repr_html_()}"


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
        return [shown(tried_in_words(self.model))]

    def __repr__(self) -> str:
        return "\n".join([*self.lines, repr(self.table), "", repr(self.outside_table)])

    def _repr_html_(self) -> str:
        above = "".join(f"<div>{html.escape(line)}</div>" for line in self.lines)
        return above + self.table._repr_html_() + self.outside_table._repr_html_()
