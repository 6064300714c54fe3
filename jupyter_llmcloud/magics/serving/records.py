"""Rows that the server has told: a list of dicts, shown as a table, and a DataFrame for whoever goes on with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jupyter_llmcloud.magics.commands.tables import Table

if TYPE_CHECKING:
    import pandas

_DIGITS = 4


class Records(list[dict[str, Any]]):
    """A list of dicts with the same keys.

    Args:
        rows: the records.
        columns: keys in the order in which they are shown; others are not shown.
        empty: what is said of none.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], columns: Sequence[str], empty: str) -> None:
        super().__init__(rows)
        self._columns = list(columns)
        self._empty = empty

    def to_frame(self) -> pandas.DataFrame:
        """The records as a DataFrame, one column for each key. Needs pandas."""
        import pandas

        return pandas.DataFrame(list(self), columns=None if self else self._columns)

    def table(self) -> Table:
        """As it is shown."""
        rows = [[_short(row.get(name)) for name in self._columns] for row in self]
        return Table([name.replace("_", " ") for name in self._columns], rows, self._empty)

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else value
