"""Arrays of Arrow, in which pandas keeps texts where pyarrow is installed."""

from __future__ import annotations

from typing import Any

from jupyter_llmcloud.training.object_graph.kinds.base import Child, Kind


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


def is_arrow_array(cls: type) -> bool:
    """Whether its instances are such arrays; imports nothing."""
    return any(base.__module__ == "pyarrow.lib" and base.__name__ in ("Array", "ChunkedArray") for base in cls.__mro__)
