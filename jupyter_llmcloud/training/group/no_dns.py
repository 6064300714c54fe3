"""A TCPStore without the names of hosts: torch asks for those of its peers' addresses, only to write them into a log.

Where a name server is slow or cannot be reached, each such question takes five seconds or more, and so would the start
of a world. glibc keeps a state of its resolver for each thread, which a program may change (man 3 resolver): when it is
to try 0 times, nothing is asked. Addresses are numbers here, and numbers need no name server. What torch then warns of
is kept from the output of the rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator


class _State(ctypes.Structure):
    """The beginning of glibc's `struct __res_state`."""

    _fields_ = [("retrans", ctypes.c_int), ("retry", ctypes.c_int)]


@contextlib.contextmanager
def no_names() -> Iterator[None]:
    """Within the block no name server is asked by this thread (glibc; elsewhere nothing changes)."""
    state = _state()
    if state is None:
        yield
        return
    before, state.retry = state.retry, 0
    errors = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        state.retry = before


def _state() -> _State | None:
    try:
        libc = ctypes.CDLL(None)
        begin, find = libc["__res_init"], libc["__res_state"]
    except (OSError, AttributeError):
        return None
    find.restype = ctypes.POINTER(_State)
    return find().contents if begin() == 0 else None
