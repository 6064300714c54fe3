"""What the process that forks ranks answers when it cannot fork: it goes on, and so does what it has forked before."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from jupyter_llmcloud.protocol.agent_messages import Describe
from jupyter_llmcloud.protocol.frames import Message, decode, encode, replace
from jupyter_llmcloud.protocol.rank_messages import ForkStore, ZygoteReady
from jupyter_llmcloud.protocol.rpc import Refused
from jupyter_llmcloud.training.zygote import Zygote

STORE = ForkStore(name="w/store1", host="127.0.0.1", port=1, number=7)


@pytest.fixture
def agent() -> Iterator[tuple[socket.socket, Zygote]]:
    """The agent's end of the pipe, and a zygote that serves one request when it is told to."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    zygote = Zygote(theirs)
    yield ours, zygote
    zygote.selector.close()
    ours.close()
    theirs.close()


def answered(agent: tuple[socket.socket, Zygote], request: Message) -> Message:
    ours, zygote = agent
    reading, writing = os.pipe()
    try:
        socket.send_fds(ours, [encode(request)], [writing])
        os.close(writing)
        zygote.fork_on_request()
        assert os.read(reading, 1) == b""  # what came with the request is closed here
    finally:
        os.close(reading)
    return decode(ours.recv(1 << 16))


def test_a_fork_that_fails_is_refused(
    agent: tuple[socket.socket, Zygote], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    for number in (7, 8):
        refused = answered(agent, replace(STORE, number=number))
        assert isinstance(refused, Refused) and (refused.code, refused.reply_to) == ("InternalError", number)
        assert "failed on ForkStore: BlockingIOError: [Errno 11] Resource temporarily" in refused.message
    assert len(caplog.records) == 2 and caplog.records[0].exc_info is not None


def test_what_is_no_request_to_fork_is_refused(agent: tuple[socket.socket, Zygote]) -> None:
    refused = answered(agent, Describe(number=3))
    assert isinstance(refused, Refused) and (refused.code, refused.reply_to) == ("ProtocolError", 3)
    assert refused.message == "the process that forks ranks does not answer Describe."


def test_that_it_is_ready_is_told(agent: tuple[socket.socket, Zygote]) -> None:
    ours, zygote = agent
    zygote.tell(ZygoteReady())
    assert decode(ours.recv(1 << 16)) == ZygoteReady()
