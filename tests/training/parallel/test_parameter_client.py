"""A worker's end of the parameter servers, when one of them has gone."""

from __future__ import annotations

import socket

import pytest

from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.training.parallel.asynchronous.client import ParameterClient


def test_a_server_that_has_gone_leaves_no_connection_to_some_of_them_and_the_way_out_is_said() -> None:
    # With one of two connections what is sent would be cut for one server.
    with socket.create_server(("127.0.0.1", 0)) as here:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            addresses = [here.getsockname(), gone.getsockname()]
        client = ParameterClient(addresses, ["a", "b"], 0)
        with pytest.raises(UsageError, match=r"parameter servers are gone.*accelerator\.prepare"):
            client.open("cell")
        assert not client.is_open
