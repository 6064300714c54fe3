"""Unix sockets that only this user can connect to."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from jupyter_llmcloud.system.unix_sockets import bind, listen


def test_a_socket_is_closed_to_others_from_its_first_moment_on(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with bind(str(tmp_path / "a.sock")):
            assert stat.S_IMODE((tmp_path / "a.sock").stat().st_mode) == 0o600
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_socket_that_was_left_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    bind(str(tmp_path / "a.sock")).close()
    bind(str(tmp_path / "a.sock")).close()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="in use"):
        bind(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_the_umask_is_what_it_was_when_a_socket_cannot_be_bound(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with pytest.raises(OSError):
            bind(str(tmp_path / ("x" * 200)))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_who_connects_is_served(tmp_path: Path) -> None:
    async def test() -> bytes:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"answer to " + await reader.readline())
            writer.close()

        server = await listen(str(tmp_path / "a.sock"), answer)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "a.sock"))
        writer.write(b"you\n")
        said = await reader.read()
        writer.close()
        server.close()
        return said

    assert asyncio.run(test()) == b"answer to you\n"
