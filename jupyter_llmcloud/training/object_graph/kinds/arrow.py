"""Arrays of Arrow, in which pandas keeps texts where pyarrow is installed; data sets of `datasets`, made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, Child, Kind, Untouched

_WHOLE = 1000  # rows that are all compared; of more, so many
_INNER = ("ex_iterable", "ex_iterables")  # what a stream of `datasets` reads


class ArrowArray(Kind):
    """An Array or ChunkedArray: it never changes, so another one takes its place.

    Tables are none: those of data sets are mapped from files, and may be larger than memory.
    """

    name = "arrow array"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        import pyarrow

        is_chunked = isinstance(value, pyarrow.ChunkedArray)
        table = pyarrow.table({"": value}).combine_chunks()  # equal ones are told alike, whatever they were made of
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return [is_chunked, sink.getvalue().to_pybytes()], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        import pyarrow

        is_chunked, data = head
        with pyarrow.ipc.open_stream(data) as stream:
            column = stream.read_all().column(0)
        if is_chunked:
            return column
        found = column.combine_chunks()
        return found.chunk(0) if isinstance(found, pyarrow.ChunkedArray) else found


class ArrowType(Kind):
    """What the items of an array are; it never changes."""

    name = "arrow type"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        import pyarrow

        return [pyarrow.schema([("", value)]).serialize().to_pybytes()], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        import pyarrow

        return pyarrow.ipc.read_schema(pyarrow.py_buffer(head[0])).field(0).type


def is_arrow_type(cls: type) -> bool:
    """Whether its instances are such types; imports nothing."""
    return any(base.__module__ == "pyarrow.lib" and base.__name__ == "DataType" for base in cls.__mro__)


def is_arrow_array(cls: type) -> bool:
    """Whether its instances are such arrays; imports nothing."""
    return any(base.__module__ == "pyarrow.lib" and base.__name__ in ("Array", "ChunkedArray") for base in cls.__mro__)


class DataSet(Untouched):
    """One of `datasets`, or a dict of them: the cell makes it again when it is executed again.

    Its rows may be more than memory, so they are not saved: what is kept tells whether it is the same.
    """

    name = "data set"
    led = True

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        return _about(value), []

    def fill(self, value: Any, head: Any, children: list[Any]) -> None:
        if not _is_alike(_about(value), head):
            raise ResumeMissed(
                "executed again, the cell has made another data set than there was at the saved place. Make the one of "
                "each round of what was there before the loop, under a name of its own: "
                "epoch_rows = rows.shuffle(seed=epoch)"
            )


def is_data_set(value: Any) -> bool:
    """Whether it is a data set of `datasets`, or a dict of them; imports nothing."""
    kinds = [base.__name__ for base in type(value).__mro__ if str(base.__module__).startswith("datasets.")]
    return bool({"Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict"} & set(kinds))


def _about(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _about(part) for name, part in value.items()}
    if hasattr(value, "_fingerprint"):
        return ["rows", value._fingerprint, _digest(value)]
    return ["stream", *_steps(getattr(value, "_ex_iterable", None))]


def _is_alike(now: Any, saved: Any) -> bool:
    """Whether they are of one making, or, where that cannot be told from one process to another, of the same rows."""
    if isinstance(now, dict) and isinstance(saved, dict):
        return now.keys() == saved.keys() and all(_is_alike(now[name], saved[name]) for name in now)
    return bool(now == saved or (now[0] == saved[0] == "rows" and now[2] == saved[2]))


_digests: dict[str, str] = {}  # by fingerprint; a data set never changes


def _digest(rows: Any) -> str:
    """Of the number of rows, their columns, and rows from all over."""
    if rows._fingerprint not in _digests:
        import pyarrow

        size = len(rows)
        number = min(size, _WHOLE)
        places = [at * (size - 1) // max(1, number - 1) for at in range(number)]
        table = rows.with_format("arrow")[places].combine_chunks() if number and rows.column_names else None
        found = hashlib.sha256(repr((size, rows.column_names)).encode())
        if table is not None:
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
                stream.write_table(table.replace_schema_metadata(None))
            found.update(sink.getvalue())
        _digests[rows._fingerprint] = found.hexdigest()
    return _digests[rows._fingerprint]


def _steps(source: Any) -> list[Any]:
    """What a stream does to its source, step by step, with what decides about its rows."""
    if source is None:
        return []
    own = vars(source) if hasattr(source, "__dict__") else {}
    told = {name: item for name, item in own.items() if type(item) in SIMPLE}
    drawn = {name: repr(item.bit_generator.state) for name, item in own.items() if hasattr(item, "bit_generator")}
    inner = [own[name] for name in _INNER if name in own]
    every = [part for item in inner for part in (item if isinstance(item, list | tuple) else [item])]
    return [type(source).__name__, told, drawn, *(_steps(part) for part in every)]
