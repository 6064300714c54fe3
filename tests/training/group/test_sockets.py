"""Which sockets are a process group's, and that ending them releases who waits, while all others stay open."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from jupyter_llmcloud.training.group.sockets import GroupSockets, shut_down, tcp_sockets


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def connected(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection."""
    one = socket.create_connection(listener.getsockname())
    return one, listener.accept()[0]


def test_listening_sockets_and_others_than_tcp_are_none_of_a_group(listener: socket.socket) -> None:
    pair = socket.socketpair()
    one, other = connected(listener)
    with one, other, pair[0], pair[1]:
        found = {fd for fd, _ in tcp_sockets()}
        assert {one.fileno(), other.fileno()} <= found
        assert not found & {listener.fileno(), *(end.fileno() for end in pair)}


def test_a_group_is_released_by_the_sockets_that_appeared_while_it_was_made(listener: socket.socket) -> None:
    sockets = GroupSockets()
    store, beside = connected(listener), connected(listener)
    sockets.begin_join()
    before = tcp_sockets()
    group = connected(listener)
    sockets.add_since(before)
    sockets.end_join()
    shut_down(sockets.to_release())
    assert group[0].recv(1) == b""
    for one, other in (store, beside):
        one.sendall(b"x")
        assert other.recv(1) == b"x"
    for sock in (*store, *beside, *group):
        sock.close()


def test_one_that_is_being_joined_is_released_with_its_store(listener: socket.socket) -> None:
    sockets = GroupSockets()
    with sockets.of_store():
        store = connected(listener)
    sockets.begin_join()
    half_made = connected(listener)
    shut_down(sockets.to_release())
    assert [end.recv(1) for end in (*store, *half_made)] == [b""] * 4
    for sock in (*store, *half_made):
        sock.close()


def test_a_number_that_another_socket_has_by_now_is_left_alone(listener: socket.socket) -> None:
    one, other = connected(listener)
    with one, other:
        shut_down({(one.fileno(), "socket:[0]")})
        one.sendall(b"x")
        assert other.recv(1) == b"x"


def test_a_default_timeout_of_the_cell_leaves_descriptors_of_others_blocking(listener: socket.socket) -> None:
    one, other = connected(listener)
    socket.setdefaulttimeout(0.5)
    try:
        assert one.fileno() in {fd for fd, _ in tcp_sockets()}
    finally:
        socket.setdefaulttimeout(None)
    with one, other:
        assert os.get_blocking(one.fileno())
