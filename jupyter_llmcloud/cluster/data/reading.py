"""The documents of a partition, read as a stream of small batches: texts, or rows of columns."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from jupyter_llmcloud.cluster.data.recipe import Recipe
from jupyter_llmcloud.core.data.partitions import WHOLE, Partition, Piece, compression_of
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets import filesystem
from jupyter_llmcloud.storage.datasets.columns import holds
from jupyter_llmcloud.storage.datasets.pixels import as_rgb
from jupyter_llmcloud.storage.datasets.streams import CHUNK, Damaged, opened

BATCH_ROWS = 2048
MAX_LINE = 256 << 20
MAX_ARRAY = 512 << 20
_SKIP = "Leave such rows out with bad_rows='skip' (they are counted), or mend the file."
_LABEL, _IMAGE = "label", "image"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ENCODING = "Say what it is: encoding='latin-1', 'cp1252', 'utf-16', ..."
_DELIMITERS = ",;\t|"
_HEADER = 1 << 16  # bytes in which a CSV file has its first row
_HEADER_ROWS = 20
_WHOLE_NUMBER = re.compile(r"[+-]?\d{16,}")
_CONVERSION = re.compile(r"In CSV column #(\d+): .*CSV conversion error to ([^:]+): invalid value '(.*)'")


class Reader:
    """Reads partitions.

    Attributes:
        num_bad: rows, or files, that could not be read and were left out.
        schema: of the file that rows come from, where that has one.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.num_bad = 0
        self.schema: Any = None

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
        recipe = self._recipe
        encoding = "utf-8" if recipe.kind == "parquet" else recipe.encoding
        compression = None if recipe.kind == "parquet" else compression_of(piece.url)
        return opened(piece.url, compression, encoding, recipe.storage)

    # --- lines ---

    def _lines(self, piece: Piece) -> Iterator[tuple[int, list[bytes]]]:
        """Lists of lines that begin in the piece, each with the place of its first byte."""
        try:
            yield from self._lines_of(piece)
        except Damaged as error:
            if not self._recipe.skip_bad:
                raise
            self._bad(piece, str(error))  # with what stands before the damage

    def _lines_of(self, piece: Piece) -> Iterator[tuple[int, list[bytes]]]:
        with filesystem.translated(piece.url), self._open(piece) as file:
            place, end, rest = piece.start, piece.end, b""
            is_begin = not piece.start
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
                if is_begin and whole.startswith(codecs.BOM_UTF8):
                    whole, place = whole[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                is_begin = False
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
                    how = "" if line[:2] not in _UTF_16 else ", as UTF-16 begins"
                    told = f"byte {wrong} is no UTF-8 text ({line[error.start : error.start + 8]!r}{how})"
                    self._bad(piece, f"{told}. {_ENCODING}")
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
        if self._is_array(piece):
            yield from self._json_array(piece)
            return
        for lines in self._decoded(piece):
            rows = []
            for line in lines:
                if not line.strip():
                    continue
                try:
                    row = _from_json(line)
                except ValueError as error:
                    hint = "" if line.strip() not in ("{", "[") else "; one object a line is expected, or one array"
                    self._bad(piece, f"a line is no JSON ({error}{hint}): {line[:80]!r}")
                    continue
                if isinstance(row, dict):
                    rows.append(row)
                else:
                    self._bad(piece, f"a line holds no JSON object, but {line[:80]!r}")
            yield rows

    def _is_array(self, piece: Piece) -> bool:
        """Whether the file is one JSON array of objects, over several lines or in one."""
        with filesystem.translated(piece.url), self._open(piece) as file:
            try:
                begin = file.read(_HEADER).removeprefix(codecs.BOM_UTF8).lstrip()
            except Damaged:  # which is said, or counted, when it is read
                return False
        return bool(begin.startswith(b"[") and begin[1:].lstrip()[:1] in (b"{", b"]", b""))

    def _json_array(self, piece: Piece) -> Iterator[list[Any]]:
        if piece.start:  # the piece in which the file begins has all of it
            return
        with filesystem.translated(piece.url), self._open(piece) as file:
            content = file.read(MAX_ARRAY + 1)
        if len(content) > MAX_ARRAY:
            raise UsageError(
                f"{piece.url!r} is one JSON array of more than {MAX_ARRAY >> 20} MiB, which is read as a whole: make "
                "lines of it (jq -c '.[]'), one object each."
            )
        try:
            rows = _from_json(content.decode("utf-8-sig"))
        except ValueError as error:
            raise UsageError(f"{piece.url!r} is no JSON array: {error}.") from None
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            for row in batch:
                if not isinstance(row, dict):
                    self._bad(piece, f"the array holds no JSON object, but {row!r:.80}")
            yield [row for row in batch if isinstance(row, dict)]

    def _csv(self, piece: Piece) -> Iterator[list[Any]]:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        def invalid(row: Any) -> str:
            self.num_bad += 1
            return "skip"

        delimiter, names = self._header(piece)
        only = [self._recipe.column] if self._recipe.tokenizer is not None else None
        if only and only[0] not in names:
            raise UsageError(_no_column(piece.url, only[0], names))
        parse = arrow_csv.ParseOptions(
            delimiter=delimiter,
            newlines_in_values=True,
            invalid_row_handler=invalid if self._recipe.skip_bad else None,
        )
        types = {name: arrow_type(kind) for name, kind in self._recipe.types}
        convert = arrow_csv.ConvertOptions(
            column_types={only[0]: pa.string()} if only else types, include_columns=only, check_utf8=True
        )
        try:
            with filesystem.translated(piece.url), self._open(piece) as file:
                reading = arrow_csv.ReadOptions(block_size=CHUNK, use_threads=False)
                stream = arrow_csv.open_csv(file, reading, parse_options=parse, convert_options=convert)
                self._check_text(piece, stream.schema)
                checked: set[str] = set()
                for batch in stream:
                    self._check_numbers(piece, batch, parse, checked)
                    for part in _parts(batch):
                        yield part.to_pylist()
        except UnicodeDecodeError as error:
            raise UsageError(f"{piece.url!r} is no UTF-8 text: {error}. {_ENCODING}") from None
        except pa.ArrowInvalid as error:
            raise UsageError(f"{piece.url!r} is not read as CSV: {_about_csv(str(error), names)}") from None

    def _header(self, piece: Piece) -> tuple[str, list[str]]:
        """What stands between columns, and their names. Raises UsageError where two have the same one."""
        with filesystem.translated(piece.url), self._open(piece) as file:
            begin = file.read(_HEADER).decode("utf-8-sig", "replace")
        delimiter = "\t" if ".tsv" in piece.url.lower() else _delimiter(begin, is_whole=len(begin) < _HEADER)
        names = next(csv.reader(io.StringIO(begin, newline=""), delimiter=delimiter), [])
        _check_names(piece.url, names, names)
        return delimiter, names

    def _check_numbers(self, piece: Piece, batch: Any, parse: Any, checked: set[str]) -> None:
        """Raises UsageError where a column of fractions has a whole number of which its type would cut digits off."""
        import pyarrow as pa
        import pyarrow.compute as compute

        for column, values in zip(batch.schema, batch.columns, strict=True):
            name = column.name
            if name in checked or name in dict(self._recipe.types) or not pa.types.is_float64(column.type):
                continue
            if compute.any(compute.greater_equal(compute.abs(values), float(1 << 53))).as_py():
                checked.add(name)
                if text := next(filter(_is_cut_off, self._texts_in(piece, name, parse)), None):
                    told = f"the column {name!r} is float64, which would make {float(text)!r} of {text}"
                    raise UsageError(f"{piece.url!r}: {told}. Say what it is: types='{name}=string' (or float64).")

    def _texts_in(self, piece: Piece, column: str, parse: Any) -> Iterator[str]:
        """What stands in a column of CSV."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        convert = arrow_csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
        reading = arrow_csv.ReadOptions(block_size=CHUNK, use_threads=False)
        with self._open(piece) as file:
            for batch in arrow_csv.open_csv(file, reading, parse_options=parse, convert_options=convert):
                yield from batch.column(0).to_pylist()

    def _check_text(self, piece: Piece, schema: Any) -> None:
        import pyarrow as pa

        for column in schema:
            if pa.types.is_binary(column.type):
                raise UsageError(f"{piece.url!r}: the column {column.name!r} is no UTF-8 text. {_ENCODING}")

    def _parquet(self, piece: Piece) -> Iterator[list[Any]]:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            with filesystem.translated(piece.url), self._open(piece) as file, parquet.ParquetFile(file) as opened_file:
                end = opened_file.num_row_groups if piece.end == WHOLE else piece.end
                self.schema = opened_file.schema_arrow
                column = self._recipe.column
                if (only := self._recipe.tokenizer is not None) and column not in self.schema.names:
                    raise UsageError(_no_column(piece.url, column, self.schema.names))
                _check_names(piece.url, [column] if only else self.schema.names, self.schema.names)
                for groups in _read_together(range(piece.start, end), self.schema):
                    for batch in opened_file.iter_batches(
                        BATCH_ROWS, groups, [column] if only else None, use_threads=False
                    ):
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
                rgb = as_rgb(image)
                if size is None:
                    picture: Any = content
                else:
                    import numpy as np

                    picture = np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR)).tobytes()
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            self._bad(piece, f"it cannot be read as an image ({error})")
            return
        label = self._recipe.classes.index(class_of(piece.url)) if self._recipe.classes else 0
        yield [{_IMAGE: picture, _LABEL: label}]


def _check_names(url: str, wanted: list[str], names: list[str]) -> None:
    """Raise UsageError where two columns have the name of one that is wanted: a row of ours has one of them."""
    if twice := [name for name, num in Counter(names).items() if num > 1 and name in wanted]:
        raise UsageError(f"{url!r} has two columns called {twice[0]!r}: rename one.")


def _read_together(groups: range, schema: Any) -> list[list[int]]:
    """Row groups of a Parquet file in one list, or each in its own: pyarrow joins no categories within a struct."""
    import pyarrow as pa

    is_flat = not any(
        pa.types.is_nested(column.type) and holds(pa.types.is_dictionary, column.type) for column in schema
    )
    return [[*groups]] if is_flat else [[group] for group in groups]


def _delimiter(begin: str, is_whole: bool) -> str:
    """What stands between columns: what gives all of the first rows as many, and most; else what the first one has."""
    found = {}
    for mark in _DELIMITERS:
        rows = [row for row in csv.reader(io.StringIO(begin, newline=""), delimiter=mark) if row]
        sizes = {len(row) for row in rows[: _HEADER_ROWS if is_whole or len(rows) > _HEADER_ROWS else -1]}
        found[mark] = sizes.pop() if len(sizes) == 1 else 0
    if max(found.values()) > 1:
        return max(found, key=found.__getitem__)
    line = begin.split("\n", 1)[0]
    return "," if "," in line else max(_DELIMITERS, key=line.count)


def _is_cut_off(number: str) -> bool:
    return _WHOLE_NUMBER.fullmatch(number) is not None and int(float(number)) != int(number)


def _from_json(text: str) -> Any:
    """As JSON, and as Python writes it, with NaN and Infinity. Raises ValueError."""
    import msgspec

    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        try:
            value = json.loads(text)
        except ValueError:
            raise ValueError(str(error)) from None
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a character, a surrogate without the other one") from None
        return value


def arrow_type(name: str) -> Any:
    """The Arrow type of a name in types=."""
    import pyarrow as pa

    return pa.type_for_alias(name)


def _no_column(url: str, column: str, names: list[str]) -> str:
    return f"{url!r} has no column {column!r}, but {', '.join(names)}. Say which holds the text: text_column=."


def _about_csv(error: str, names: list[str]) -> str:
    if found := _CONVERSION.search(error):
        number, kind, value = found.groups()
        name = names[int(number)] if int(number) < len(names) else f"#{number}"
        return (
            f"the column {name!r} is {kind} in its first {CHUNK >> 20} MiB, and later there is {value!r}. Say what it "
            f"is: types='{name}=string' (or float64)."
        )
    return f"{error}. {_SKIP}"


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
