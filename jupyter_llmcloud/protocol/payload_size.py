"""How much of variables can travel in one message, and what is said of more."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.protocol.frames import MAX_HEADER, MAX_PAYLOAD

MAX_VARIABLES = MAX_PAYLOAD - MAX_HEADER  # pickled; on its way to another host a message is carried in another one
_MAX_NAMED = 5


class TooLarge(Exception):
    """Variables that cannot travel; says which, and what to do."""


class _Full(Exception):
    pass


class _BoundedFile(io.BytesIO):
    """Takes no more than `limit` bytes, so that what is too large does not fill the memory before that is noticed."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._left -= size
        if self._left < 0:
            raise _Full
        return super().write(data)


class CountingFile(io.RawIOBase):
    """Keeps nothing but the number of bytes."""

    num_bytes = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size


def known_size(value: Any) -> int:
    """Bytes that a tensor, an array or a string of bytes takes at the least; 0 for what only pickling can tell."""
    if isinstance(value, bytes | bytearray):
        return len(value)
    with contextlib.suppress(Exception):  # a class of its own, or what only looks like a tensor
        if hasattr(value, "untyped_storage"):  # of a view everything is pickled that it looks at
            return 0 if value.device.type == "meta" else int(value.untyped_storage().nbytes())
        if hasattr(value, "__array_interface__"):
            return int(value.nbytes)
    return 0


def dump_within(
    values: Mapping[str, Any], dump: Callable[[Any, Any], None], limit: int, what: str, folder: str
) -> bytes:
    """`values` as `dump(value, file)` writes them.

    Raises TooLarge, which names `what` was wanted, the variables and their sizes, and `folder` as a way out, when they
    take more than `limit` bytes.
    """
    known = {name: size for name, value in values.items() if (size := known_size(value)) > limit}
    if known:
        raise TooLarge(refusal(what, known, limit, folder))
    try:
        with _BoundedFile(limit) as file:
            dump(dict(values), file)
            return file.getvalue()
    except _Full:
        sizes = {}
        for name, value in values.items():
            counting = CountingFile()
            dump(value, counting)
            sizes[name] = counting.num_bytes
        raise TooLarge(refusal(what, sizes, limit, folder)) from None


def dump_variables(
    values: Mapping[str, Any],
    dump: Callable[[Any, Any], None],
    what: str,
    folder: str,
    refused: Callable[[str, Any, Exception], Exception],
) -> bytes:
    """`values` as `dump(value, file)` writes them, for one message.

    Raises UsageError when they are too large for that, and what `refused(name, value, error)` makes of the first that
    cannot be written.
    """
    try:
        return dump_within(values, dump, MAX_VARIABLES, what, folder)
    except TooLarge as error:
        raise UsageError(str(error)) from None
    except Exception:
        for name, value in values.items():
            try:
                dump(value, CountingFile())
            except Exception as error:
                raise refused(name, value, error) from None
        raise


def refusal(what: str, sizes: Mapping[str, int], limit: int, folder: str) -> str:
    """What is said of variables that are too large, each alone or all together."""
    ordered = sorted(sizes.items(), key=lambda row: row[1], reverse=True)
    alone = [row for row in ordered if row[1] > limit]
    shown = (alone or ordered)[:_MAX_NAMED]
    listed = ", ".join(f"{name} ({amount(size)})" for name, size in shown)
    if more := len(alone or ordered) - len(shown):
        listed += f" and {more} more"
    name = shown[0][0]
    other = "" if alone else f"Fewer at a time may do. Otherwise save what is large, such as {name},"
    together = "" if alone else f", {amount(sum(sizes.values()))} together"
    return (
        f"{what}: {listed}{together}, but at most {amount(limit)} of variables can travel at once. Nothing was copied. "
        f"{other or f'Save {name}'} to a folder that the notebook and the ranks see, such as {folder}, "
        "and load it on the other side."
    )


def amount(num_bytes: int) -> str:
    """`4.0 GiB`."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
