"""Records from one process to another through shared memory: a call costs a copy, a killed writer loses nothing.

One writer, one reader. The writer keeps the position it has written to, the reader the one it has read to; both are
byte counts that only grow. Each record is its length (u32) and its bytes. The memory belongs to a file descriptor
without a name, so it goes with the last process that has it.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import threading
import time

SIZE = 1 << 20  # of the data, bytes
_WRITTEN, _READ, _DATA = 0, 8, 128  # the positions are words 0 and 8, on cache lines of their own
_LENGTH = struct.Struct("=I")
_pack_length = _LENGTH.pack
FULL_POLL_S = 0.001


def create_ring() -> int:
    """A descriptor of fresh shared memory; both ends map it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("llmcloud-ring", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, _DATA + SIZE)
    return fd


class RingWriter:
    """The writing end. `write` waits when the reader is a whole ring behind."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _DATA + SIZE)
        self._positions = memoryview(self._memory)[:_DATA].cast("Q")
        self._written: int = self._positions[_WRITTEN]
        self._read: int = self._positions[_READ]
        self._lock = threading.Lock()

    def write(self, record: bytes) -> None:
        """Append a record; raises ValueError for one that can never fit."""
        size = len(record) + 4
        if size > SIZE:
            raise ValueError(f"a record of {len(record)} bytes does not fit a ring of {SIZE}")
        with self._lock:
            while self._written + size - self._read > SIZE:
                self._read = self._positions[_READ]
                if self._written + size - self._read > SIZE:
                    time.sleep(FULL_POLL_S)
            start = self._written % SIZE
            if start + size <= SIZE:
                begin = _DATA + start
                self._memory[begin : begin + size] = _pack_length(size - 4) + record
            else:
                self._wrap(start, _pack_length(size - 4) + record)
            self._written += size
            self._positions[_WRITTEN] = self._written  # last: what it covers is complete

    def _wrap(self, start: int, data: bytes) -> None:
        head = SIZE - start
        self._memory[_DATA + start : _DATA + SIZE] = data[:head]
        self._memory[_DATA : _DATA + len(data) - head] = data[head:]


class RingReader:
    """The reading end."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _DATA + SIZE)
        self._positions = memoryview(self._memory)[:_DATA].cast("Q")
        self._position: int = 0

    def read(self) -> list[bytes]:
        """Every record written since the last call."""
        written = self._positions[_WRITTEN]
        records = []
        while self._position < written:
            (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
            records.append(self._take(length))
        self._positions[_READ] = self._position
        return records

    def _take(self, size: int) -> bytes:
        start = self._position % SIZE
        self._position += size
        if start + size <= SIZE:
            return self._memory[_DATA + start : _DATA + start + size]
        head = SIZE - start
        return self._memory[_DATA + start : _DATA + SIZE] + self._memory[_DATA : _DATA + size - head]

    def close(self) -> None:
        """Unmap."""
        self._positions.release()
        self._memory.close()
