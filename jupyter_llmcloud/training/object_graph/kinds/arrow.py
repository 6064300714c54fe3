"""Arrays of Arrow, in which pandas keeps texts where pyarrow is installed; tables; data sets of `datasets`."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.training.checkpoint.errors import ResumeMissed
from jupyter_llmcloud.training.object_graph.kinds.base import SIMPLE, CannotSave, Child, Kind, Untouched

_WHOLE = 1000  # rows that are all compared; of more, so many
_SAVED = 1 << 20  # bytes of a table that are saved; of a larger one it is told whether it is the same
_READ = 4 << 30  # bytes of a table that are all compared: one that is mapped from a file may be larger than memory
_INNER = ("ex_iterable", "ex_iterables")  # what a stream of `datasets` reads


class ArrowArray(Kind):
    """An Array or ChunkedArray: it never changes, so another one takes its place."""

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


class ArrowScalar(ArrowArray):
    """One value of an array."""

    name = "arrow scalar"

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        import pyarrow

        return super().split(pyarrow.repeat(value, 1))

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        return super().build(cls, head, children)[0]


class ArrowTable(Kind):
    """A Table or RecordBatch. It never changes either, but may be large: then it is compared, once, and not saved."""

    name = "arrow table"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        import pyarrow

        is_batch = isinstance(value, pyarrow.RecordBatch)
        if value.nbytes > _SAVED:
            return [is_batch, value.num_rows, _digest_of(value)], []
        sink = pyarrow.BufferOutputStream()
        _write(_as_table(value), sink)
        return [is_batch, value.num_rows, sink.getvalue().to_pybytes()], []

    def refusal(self, head: Any) -> str:
        return f"a table of Arrow of more than {_SAVED:,} bytes" if isinstance(head[2], str) else ""

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        import pyarrow

        is_batch, num_rows, data = head
        if isinstance(data, str):
            raise CannotSave(self.refusal(head))
        with pyarrow.ipc.open_stream(data) as stream:
            table = stream.read_all()
        if not is_batch:
            return table
        return table.combine_chunks().to_batches()[0] if num_rows else pyarrow.RecordBatch.from_pylist([], table.schema)


class _Hash:
    """A file that nothing is kept of but a hash."""

    closed = False

    def __init__(self) -> None:
        self.found = hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        self.found.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


def _write(table: Any, sink: Any) -> None:
    import pyarrow

    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


_digests_by_id: dict[int, tuple[weakref.ref[Any], str]] = {}


def _digest_of(table: Any) -> str:
    """Of its contents, which are read once; of one that is very large, of rows from all over."""
    known = _digests_by_id.get(id(table))
    if known is None or known[0]() is not table:
        import pyarrow

        size, found = len(table), _Hash()
        if table.nbytes > _READ:
            _write(_as_table(table).take(_places(size)), sink := pyarrow.BufferOutputStream())
            found.write(sink.getvalue())
        else:
            _write(_as_table(table), pyarrow.PythonFile(found, "w"))
        known = _digests_by_id[id(table)] = weakref.ref(table, _Forget(id(table))), found.found.hexdigest()
    return known[1]


class _Forget:
    """A table has gone: another one may have its place."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __call__(self, _: Any) -> None:
        _digests_by_id.pop(self._place, None)


def _as_table(value: Any) -> Any:
    import pyarrow

    return pyarrow.Table.from_batches([value]) if isinstance(value, pyarrow.RecordBatch) else value


def _places(size: int) -> list[int]:
    number = min(size, _WHOLE)
    return [at * (size - 1) // max(1, number - 1) for at in range(number)]


class ArrowType(Kind):
    """What the items of an array are, a Field or a Schema; it never changes."""

    name = "arrow type"
    filled = False

    def split(self, value: Any) -> tuple[Any, list[Child]]:
        import pyarrow

        if not isinstance(value, pyarrow.Schema):
            value = pyarrow.schema([value if isinstance(value, pyarrow.Field) else ("", value)])
        return [value.serialize().to_pybytes()], []

    def build(self, cls: Any, head: Any, children: list[Any]) -> Any:
        import pyarrow

        schema = pyarrow.ipc.read_schema(pyarrow.py_buffer(head[0]))
        if issubclass(cls, pyarrow.Schema):
            return schema
        return schema.field(0) if issubclass(cls, pyarrow.Field) else schema.field(0).type


ARRAY, TABLE, TYPE, SCALAR = ArrowArray(), ArrowTable(), ArrowType(), ArrowScalar()
_KINDS: dict[str, Kind] = {
    "Array": ARRAY, "ChunkedArray": ARRAY, "Table": TABLE, "RecordBatch": TABLE, "Scalar": SCALAR,
    "DataType": TYPE, "Field": TYPE, "Schema": TYPE,
}  # fmt: skip


def kind_of_arrow(cls: type) -> Kind | None:
    """The kind of the values of Arrow that its instances are; imports nothing."""
    bases = [base.__name__ for base in cls.__mro__ if base.__module__ == "pyarrow.lib"]
    return next((_KINDS[name] for name in bases if name in _KINDS), None)


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
        table = rows.with_format("arrow")[_places(size)].combine_chunks() if size and rows.column_names else None
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
