"""Tables of pandas, Arrow and polars, row by row: known by what they offer, as none of them is imported for that."""

from __future__ import annotations

from typing import Any


def rows_of(table: Any) -> list[Any] | None:
    """The rows of a table as mappings, or the values of one of Arrow's columns; None for what is no such thing."""
    if hasattr(table, "iterrows") and hasattr(table, "to_dict"):
        rows: list[Any] = table.to_dict("records")
        return rows
    for method in ("to_pylist", "to_dicts"):  # Arrow's; polars'
        if callable(found := getattr(table, method, None)):
            return list(found())
    return None
