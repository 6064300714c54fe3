"""What the process that forks ranks answers when it cannot fork: it goes on, and so does what it has forked before."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupyter_llmcloud.protocol.agent_messages import Describe
from jupyter_llmcloud.protocol.connection import NEXT_AGENT
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


def test_the_next_agent_finds_it_when_the_one_before_has_gone_and_none_of_what_that_had_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NEXT_AGENT, f"10:{tmp_path / 'next.sock'}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    zygote = Zygote(theirs)
    assert NEXT_AGENT not in os.environ
    child = os.posix_spawn("/bin/sleep", ["sleep", "100"], {})
    pidfd = os.pidfd_open(child)
    zygote.children[pidfd] = (child, "w/0/1")
    zygote.selector.register(pidfd, selectors.EVENT_READ)
    ours.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as following:
        following.connect(str(tmp_path / "next.sock"))
        zygote.fork_on_request()
        assert decode(following.recv(1 << 16)) == ZygoteReady()
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
        assert answered((following, zygote), Describe(number=3)).reply_to == 3  # type: ignore[attr-defined]
    zygote.selector.close()
    zygote.control.close()
    zygote.next_agent.close()


def test_that_it_is_ready_is_told(agent: tuple[socket.socket, Zygote]) -> None:
    ours, zygote = agent
    zygote.tell(ZygoteReady())
    assert decode(ours.recv(1 << 16)) == ZygoteReady()
