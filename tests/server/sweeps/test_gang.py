"""The messages that a gang sends for a trial, over a connection that is played."""

from __future__ import annotations

import asyncio
from typing import Any

from jupyter_llmcloud.protocol.agent_messages import Execute, RunEnded, StopRun
from jupyter_llmcloud.server.sweeps.gang import Gang


class PlayedConnection:
    """Keeps what is sent; a run ends when it is stopped."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self.hear: Any = None

    async def request(self, message: Any, timeout_s: float | None = 30.0) -> None:
        self.sent.append(message)
        if isinstance(message, Execute):
            await asyncio.get_running_loop().create_future()
        self.hear(RunEnded(run_id=message.run_id, state="stopped"))


async def test_a_stop_goes_behind_the_cell_that_it_is_meant_for() -> None:
    """An agent does not know a run before its cell has come, and would refuse to stop it."""
    connection: Any = PlayedConnection()
    gang = Gang({"cluster": "c", "agents": [{"address": "/a"}], "world_id": "w", "num_ranks": 1}, connection)
    cell = Execute(run_id="r", world_id="w", ranks=[0], code="", filename="c", name="r")
    going = asyncio.ensure_future(gang.run(cell, lambda *_: None))
    stopping = asyncio.ensure_future(gang.stop())
    ended = await asyncio.wait_for(going, 5)
    await stopping
    assert ended.state == "stopped" and [type(message) for message in connection.sent] == [Execute, StopRun]
