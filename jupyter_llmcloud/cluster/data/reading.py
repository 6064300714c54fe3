"""The documents of a partition, read as a stream of small batches: texts, or rows of columns."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.core.data.partitions import WHOLE, Partition, Piece, compression_of
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets import filesystem

CHUNK = 4 << 20  # bytes that are read at once
BATCH_ROWS = 2048
MAX_LINE = 256 << 20
_SKIP = "Leave such rows out with bad_rows='skip' (they are counted), or mend the file."
_LABEL, _IMAGE = "label", "image"


class Reader:
    """Reads partitions.

    Attributes:
        num_bad: rows, or files, that could not be read and were left out.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.num_bad = 0

    def batches(self, partition: Partition) -> Iterator[list[Any]]:
        """Batches of documents: texts where the recipe makes tokens or the source is text, else rows (dicts)."""
        read: Callable[[Piece], Iterator[list[Any]]] = {
            "text": self._texts,
            "jsonl": self._json,
            "csv": self._csv,
            "parquet": self._parquet,
            "images": self._image,
        }[self._recipe.kind]
        for piece in partition.pieces:
            for batch in read(piece):
                yield self._texts_of(batch, piece) if self._wants_texts(batch) else batch

    def _wants_texts(self, batch: list[Any]) -> bool:
        return self._recipe.tokenizer is not None and bool(batch) and isinstance(batch[0], dict)

    def _texts_of(self, batch: list[dict[str, Any]], piece: Piece) -> list[str]:
        column, texts = self._recipe.column, []
        for row in batch:
            if isinstance(text := row.get(column), str):
                texts.append(text)
            else:
                told = f"has no text in the column {column!r}, but {text!r:.40} (columns: {', '.join(map(str, row))})"
                self._bad(piece, f"a row {told}. Say which holds the text: text_column=")
        return texts

    def _bad(self, piece: Piece, what: str) -> None:
        if not self._recipe.skip_bad:
            raise UsageError(f"{piece.url!r}: {what}. {_SKIP}")
        self.num_bad += 1

    def _open(self, piece: Piece) -> Any:
        fs, path = filesystem.filesystem(piece.url, self._recipe.storage)
        compression = compression_of(piece.url)
        if compression == "zstd":
            filesystem.require("zstandard", what=f"{piece.url!r}")
        with filesystem.translated(piece.url):
            if compression is None:
                return fs.open(path, "rb", block_size=CHUNK)
            import fsspec.core

            return fsspec.core.OpenFile(fs, path, "rb", compression=compression).open()

    # --- lines ---

    def _lines(self, piece: Piece) -> Iterator[tuple[int, list[bytes]]]:
        """Lists of lines that begin in the piece, each with the place of its first byte."""
        with filesystem.translated(piece.url), self._open(piece) as file:
            place, end, rest = piece.start, piece.end, b""
            if piece.start:  # the line in which the piece begins belongs to the one before
                file.seek(piece.start - 1)
                place += len(_line(file, piece)) - 1
            while end == WHOLE or place < end:
                chunk = file.read(CHUNK if end == WHOLE else max(1, min(CHUNK, end - place - len(rest))))
                if not chunk:
                    break
                whole = rest + chunk
                if end != WHOLE and place + len(whole) >= end and not whole.endswith(b"\n"):
                    whole += _line(file, piece)
                cut = whole.rfind(b"\n") + 1
                lines, rest = whole[:cut], whole[cut:]
                if len(rest) > MAX_LINE:
                    raise UsageError(f"{piece.url!r}: a line is longer than {MAX_LINE >> 20} MiB: is it text?")
                if lines:
                    yield place, lines[:-1].split(b"\n")
                    place += len(lines)
            if rest and (end == WHOLE or place < end):
                yield place, [rest]

    def _decoded(self, piece: Piece) -> Iterator[list[str]]:
        for place, lines in self._lines(piece):
            try:
                whole = b"\n".join(lines).decode()
            except UnicodeDecodeError:
                whole = None
            if whole is not None and "\x00" not in whole:
                yield [line.removesuffix("\r") for line in whole.split("\n")]
                continue
            texts, at = [], place
            for line in lines:
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    wrong = at + error.start
                    self._bad(piece, f"byte {wrong} is no UTF-8 text ({line[error.start : error.start + 8]!r})")
                else:
                    if "\x00" in text:
                        self._bad(piece, f"there is a zero byte at {at + line.index(0)}, so it is no text")
                    else:
                        texts.append(text.removesuffix("\r"))
                at += len(line) + 1
            yield texts

    def _texts(self, piece: Piece) -> Iterator[list[str]]:
        unit = self._recipe.unit
        if unit == "line":
            for lines in self._decoded(piece):
                yield [line for line in lines if line]
            return
        if unit == "file":
            yield ["\n".join(line for lines in self._decoded(piece) for line in lines)]
            return
        paragraph: list[str] = []
        for lines in self._decoded(piece):
            found = []
            for line in lines:
                if line.strip():
                    paragraph.append(line)
                elif paragraph:
                    found.append("\n".join(paragraph))
                    paragraph = []
            yield found
        if paragraph:
            yield ["\n".join(paragraph)]

    # --- rows ---

    def _json(self, piece: Piece) -> Iterator[list[Any]]:
        import msgspec

        for lines in self._decoded(piece):
            rows = []
            for line in lines:
                if not line.strip():
                    continue
                try:
                    row = msgspec.json.decode(line)
                except msgspec.DecodeError as error:
                    self._bad(piece, f"a line is no JSON ({error}): {line[:80]!r}")
                    continue
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    self._bad(piece, f"a line holds no JSON object, but {line[:80]!r}")
            yield rows

    def _csv(self, piece: Piece) -> Iterator[list[Any]]:
        import pyarrow as pa
        from pyarrow import csv

        def invalid(row: Any) -> str:
            self.num_bad += 1
            return "skip"

        delimiter = "\t" if ".tsv" in piece.url.lower() else ","
        parse = csv.ParseOptions(
            delimiter=delimiter,
            newlines_in_values=True,
            invalid_row_handler=invalid if self._recipe.skip_bad else None,
        )
        text_only = self._recipe.tokenizer is not None
        convert = csv.ConvertOptions(column_types={self._recipe.column: pa.string()} if text_only else None)
        try:
            with filesystem.translated(piece.url), self._open(piece) as file:
                reading = csv.ReadOptions(block_size=CHUNK, use_threads=False)
                stream = csv.open_csv(file, reading, parse_options=parse, convert_options=convert)
                for batch in stream:
                    for part in _parts(batch):
                        yield part.to_pylist()
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise UsageError(f"{piece.url!r} is not read as CSV: {error}. {_SKIP}") from None

    def _parquet(self, piece: Piece) -> Iterator[list[Any]]:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            with filesystem.translated(piece.url), self._open(piece) as file, parquet.ParquetFile(file) as opened:
                groups = None if piece.end == WHOLE else list(range(piece.start, piece.end))
                names = opened.schema_arrow.names
                column = self._recipe.column
                if (only := self._recipe.tokenizer is not None) and column not in names:
                    raise UsageError(
                        f"{piece.url!r} has no column {column!r}, but {', '.join(names)}. Say which holds the text: "
                        "text_column=."
                    )
                for batch in opened.iter_batches(BATCH_ROWS, groups, [column] if only else None, use_threads=False):
                    yield batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, pa.ArrowException):
                raise UsageError(f"{piece.url!r} cannot be read as Parquet: {error}.") from None
            raise

    def _image(self, piece: Piece) -> Iterator[list[Any]]:
        from PIL import Image, UnidentifiedImageError

        content = filesystem.read_bytes(piece.url, self._recipe.storage)
        size = self._recipe.image_size
        try:
            with Image.open(io.BytesIO(content)) as image:
                if size is None:
                    image.verify()
                    picture: Any = content
                else:
                    import numpy as np

                    picture = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)).tobytes()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            self._bad(piece, f"it cannot be read as an image ({error})")
            return
        label = self._recipe.classes.index(class_of(piece.url)) if self._recipe.classes else 0
        yield [{_IMAGE: picture, _LABEL: label}]


def class_of(url: str) -> str:
    """The name of an image's class: its folder."""
    return url.rsplit("/", 2)[-2] if url.count("/") else ""


def _line(file: Any, piece: Piece) -> bytes:
    """What is left of the line in which the file is; with its end, if it has one."""
    parts = []
    while chunk := file.read(1 << 16):
        at = chunk.find(b"\n")
        if at >= 0:
            file.seek(at + 1 - len(chunk), io.SEEK_CUR)
            parts.append(chunk[: at + 1])
            break
        parts.append(chunk)
        if len(parts) << 16 > MAX_LINE:
            raise UsageError(f"{piece.url!r}: a line is longer than {MAX_LINE >> 20} MiB: is it text?")
    return b"".join(parts)


def _parts(batch: Any) -> Iterator[Any]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)
