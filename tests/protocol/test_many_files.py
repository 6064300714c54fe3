"""A notebook that has many files open speaks with its ranks all the same."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import closing
from pathlib import Path

from jupyter_llmcloud.protocol.client import AgentChannel


def test_a_channel_waits_on_a_descriptor_above_those_that_select_knows(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with closing(socket.socket(socket.AF_UNIX)) as agent:
            agent.bind(str(tmp_path / "s"))
            agent.listen()
            with closing(AgentChannel(str(tmp_path / "s"))) as channel:
                assert channel.fileno() > 1023
                assert channel.receive(0.01) is None
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
