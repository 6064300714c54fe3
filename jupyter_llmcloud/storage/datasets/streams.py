"""Files of other people as plain UTF-8: decompressed to their real end, and from the encoding that they are in."""

from __future__ import annotations

import io
import lzma
import zlib
from typing import Any

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.storage.datasets import filesystem

CHUNK = 4 << 20  # bytes that are read at once
_PACKED = 1 << 20


class Damaged(UsageError):
    """A compressed file is cut off, or is no such file."""


def opened(url: str, compression: str | None, encoding: str, storage: Any = None) -> Any:
    """The content of a file, to be read from its beginning to its end, or to be sought in where it is a plain one."""
    if compression == "zstd":
        filesystem.require("zstandard", what=f"{url!r}")
    fs, path = filesystem.filesystem(url, storage)
    with filesystem.translated(url):
        file: Any = fs.open(path, "rb", block_size=CHUNK)
        if compression is not None:
            file = io.BufferedReader(_Checked(_decompressed(file, compression), url, compression), CHUNK)
        if encoding != "utf-8":
            file = io.BufferedReader(_Recoded(file, url, encoding), CHUNK)
    return file


def _decompressed(file: Any, compression: str) -> Any:
    if compression == "zstd":
        return io.BufferedReader(_ZstdFrames(file), CHUNK)
    from fsspec.compression import compr

    return compr[compression](file, mode="rb")


class _Checked(io.RawIOBase):
    """A file that is decompressed, with what is wrong with it in words."""

    def __init__(self, file: Any, url: str, compression: str) -> None:
        self._file = file
        self._url = url
        self._compression = compression

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read(len(buffer))
        except (EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError) as error:
            raise Damaged(
                f"{self._url!r} is cut off or damaged, or is no {self._compression} file: "
                f"{str(error).rstrip('.') or type(error).__name__}. Copy it anew."
            ) from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file, one behind the other; the reader of fsspec ends behind the first one."""

    def __init__(self, file: Any) -> None:
        import zstandard

        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            if not self._packed and not (packed := self._file.read(_PACKED)):
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._decompress(self._packed or packed)
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _decompress(self, packed: bytes) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(packed))
        except self._error as error:
            raise OSError(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        self._file.close()
        super().close()


class _Recoded(io.RawIOBase):
    """A text in another encoding as UTF-8."""

    def __init__(self, file: Any, url: str, encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, newline="")
        self._url = url
        self._encoding = encoding
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._content:
            try:
                self._content = memoryview(self._text.read(_PACKED).encode())
            except UnicodeError as error:
                raise UsageError(f"{self._url!r} is no {self._encoding} text: {error}. Say its encoding=.") from None
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def close(self) -> None:
        self._text.close()
        super().close()
