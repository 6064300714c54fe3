"""Small tables for the cell: text for a terminal, HTML for a notebook, everything escaped."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from jupyter_llmcloud.widgets.panel_mime import Kind, panel
from jupyter_llmcloud.widgets.static_view import aligned

_NUMBER = re.compile(r"-?[\d,]*\.?\d+(e-?\d+)?( ?%)?")


@dataclass(frozen=True)
class PanelOf:
    """What a panel shows in place of a table, where the front end can; an empty id stands for all there are."""

    kind: Kind
    ident: str = ""


class Table:
    """Rows under headings; displayed by IPython. Numbers are at the right of their columns, text at the left.

    Attributes:
        panel: what shows the same live in front ends that can; the table is its static form.
    """

    panel: PanelOf | None = None

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
        self.headings = list(headings)
        self.rows = [["" if cell is None else str(cell) for cell in row] for row in rows]
        self.empty = empty

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        if not self.rows:
            return self.empty
        table = [self.headings, *self.rows] if any(self.headings) else self.rows
        widths = [max(len(row[i]) for row in table) for i in range(len(self.headings))]
        sides = self._sides()
        return "\n".join(
            "  ".join(
                cell.rjust(width) if side == "right" else cell.ljust(width)
                for cell, width, side in zip(row, widths, sides, strict=True)
            ).rstrip()
            for row in table
        )

    def shown_by(self, panel: PanelOf) -> Self:
        """The same table, with a panel that shows it live."""
        self.panel = panel
        return self

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Text and HTML, and in a kernel the panel; for IPython, which hands over what to include and exclude."""
        from IPython.core.getipython import get_ipython

        data: dict[str, Any] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if self.panel is None or getattr(get_ipython(), "kernel", None) is None:
            return data
        from jupyter_llmcloud.widgets.server_panels import widget_view  # anywidget takes its time to import

        kind, ident = self.panel.kind, self.panel.ident
        return {**widget_view(kind, ident, repr(self)), **data, **panel(kind, ident, ident)}

    def _sides(self) -> list[str]:
        columns = [[row[at] for row in self.rows if row[at]] for at in range(len(self.headings))]
        return ["right" if cells and all(map(_NUMBER.fullmatch, cells)) else "left" for cells in columns]

    def _repr_html_(self) -> str:
        if not self.rows:
            return f"<p>{html.escape(self.empty)}</p>"
        sides = self._sides()
        head = "".join(
            f"<th {aligned(s)}>{html.escape(text)}</th>" for text, s in zip(self.headings, sides, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(f"<td {aligned(side)}>{html.escape(cell)}</td>" for cell, side in zip(row, sides, strict=True))
            + "</tr>"
            for row in self.rows
        )
        top = f"<thead><tr>{head}</tr></thead>" if any(self.headings) else ""
        return f"<table>{top}<tbody>{body}</tbody></table>"


def ago(then: float) -> str:
    """`5 s ago`, `3 min ago`, ..."""
    return f"{span(max(0.0, time.time() - then))} ago"


def span(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `2.5 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
