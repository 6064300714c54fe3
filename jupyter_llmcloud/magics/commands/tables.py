"""Small tables for the cell: text for a terminal, HTML for a notebook, everything escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence


class Table:
    """Rows under headings; displayed by IPython."""

    def __init__(self, headings: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
        self.headings = list(headings)
        self.rows = [["" if cell is None else str(cell) for cell in row] for row in rows]
        self.empty = empty

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        if not self.rows:
            return self.empty
        table = [self.headings, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.headings))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        )

    def _repr_html_(self) -> str:
        if not self.rows:
            return f"<p>{html.escape(self.empty)}</p>"
        head = "".join(f'<th align="left">{html.escape(heading)}</th>' for heading in self.headings)
        body = "".join(
            "<tr>" + "".join(f'<td align="left">{html.escape(cell)}</td>' for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


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
