"""Ranks meet at once also where no name server answers."""

from __future__ import annotations

import os
import socket
import time

import pytest

from jupyter_llmcloud.training.group.no_dns import _state, no_names


@pytest.mark.alone
def test_within_the_block_no_name_server_is_asked_and_afterwards_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    before = _state()
    assert before is not None, "this C library keeps its resolver's state elsewhere"
    retries = before.retry
    began = time.monotonic()
    with no_names():
        os.write(2, b"a warning\n")
        with pytest.raises(socket.gaierror) as asked:
            socket.getaddrinfo("a-name-that-no-file-here-has.invalid", 1)
        assert socket.getaddrinfo("127.0.0.1", 1), "numbers need no server"
    assert asked.value.errno == socket.EAI_AGAIN, "a server has answered"
    assert time.monotonic() - began < 1
    os.write(2, b"an error\n")
    assert capfd.readouterr().err == "an error\n"
    assert _state().retry == retries  # type: ignore[union-attr]
    assert retries > 0
