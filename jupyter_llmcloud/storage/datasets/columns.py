"""Values as columns of one type, with nothing lost in silence: what pyarrow would cut off or leave out is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jupyter_llmcloud.errors import UsageError


def typed(values: list[Any], wanted: Any) -> Any:
    """An Arrow array of a type. Raises ValueError, TypeError, OverflowError where a value does not fit into it whole.

    pyarrow by itself makes 1 of 1.5 where whole numbers are wanted, and leaves fields out that a struct does not have.
    """
    import pyarrow as pa

    try:
        found = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        if holds(pa.types.is_map, wanted):  # of which pyarrow makes no type by itself
            return pa.array(values, wanted)
        if not (isinstance(error, OverflowError) and holds(pa.types.is_uint64, wanted)):  # nor of these
            raise
        return _fitted(values, pa.array(_small(values)).type, wanted)
    if found.type == wanted:
        return found
    if pa.types.is_floating(found.type) and pa.types.is_integer(wanted):
        return found.cast(wanted)  # which refuses fractions
    return _fitted(values, found.type, wanted)


def _fitted(values: list[Any], found: Any, wanted: Any) -> Any:
    import pyarrow as pa

    if lost := lost_in(found, wanted):
        raise ValueError(f"{lost} would be lost")
    return pa.array(values, wanted)


def lost_in(found: Any, wanted: Any) -> str:
    """What of values of one type the other one has no room for; "" where all of them have a place in it."""
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_struct(found) and kinds.is_struct(wanted):
        for field in found:
            at = wanted.get_field_index(field.name)
            if at < 0:
                return f"the field {field.name!r}"
            if lost := lost_in(field.type, wanted.field(at).type):
                return f"{lost} of the field {field.name!r}" if " of the field" not in lost else lost
    if _is_list(found) and _is_list(wanted):
        return lost_in(found.value_type, wanted.value_type)
    if kinds.is_floating(found) and kinds.is_integer(wanted):
        return "fractions"
    if kinds.is_timestamp(found) and kinds.is_date(wanted):
        return "times of day"
    if kinds.is_timestamp(found) and kinds.is_timestamp(wanted) and (found.tz is None) != (wanted.tz is None):
        return "the time zone"
    return ""


def table_of(rows: Sequence[dict[str, Any]], known: Any = None) -> Any:
    """Rows as a table with every column that any of them has. Raises UsageError for a column of several types.

    `known`: the schema of the file they come from, where that has one.
    """
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        at = known.get_field_index(str(name)) if known is not None else -1
        try:
            columns[str(name)] = _as_in_its_file(values, known.field(at).type) if at >= 0 else pa.array(values)
        except OverflowError:
            raise UsageError(
                f"the column {name!r} holds whole numbers beyond 2**63 - 1. Make text of them, in "
                "the source or by a step."
            ) from None
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise UsageError(
                f"the column {name!r} holds values of several types: {error}. Bring it to one type by a step."
            ) from None
    return pa.table(columns)


def unified(schemas: Sequence[Any], what: str) -> Any:
    """The columns of all of them, each with a type that holds those of all. Raises UsageError where there is none."""
    import pyarrow as pa

    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UsageError(
            f"the {what} of the source do not have the same columns: {error}. Say the type of a column "
            "(types='zip=string'), or bring it to one by a step of your own."
        ) from None


def _as_in_its_file(values: list[Any], of_file: Any) -> Any:
    """With the type that they had there, unless a step has made something else of them."""
    import pyarrow as pa

    try:
        return typed(values, of_file)
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, OverflowError):
        return pa.array(values)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def holds(is_kind: Callable[[Any], bool], kind: Any) -> bool:
    """Whether a type, or one inside it, is of a kind."""
    import pyarrow as pa

    if is_kind(kind):
        return True
    if _is_list(kind):
        return holds(is_kind, kind.value_type)
    if pa.types.is_map(kind):
        return holds(is_kind, kind.item_type)
    return bool(pa.types.is_struct(kind)) and any(holds(is_kind, field.type) for field in kind)


def _small(value: Any) -> Any:
    """The same with small numbers in place of those beyond 64 bits with a sign: for the type of everything else."""
    if isinstance(value, dict):
        return {name: _small(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_small(inner) for inner in value]
    return 0 if isinstance(value, int) and value.bit_length() > 63 else value
