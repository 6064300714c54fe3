"""Sweeps over REST: what is refused, what is told, what becomes of one that cannot have ranks."""

from __future__ import annotations

from tests.support.server_parts import Server

pytest_plugins = ["tests.support.server_fixtures"]
SWEEPS = "llmcloud/api/sweeps"


async def test_there_are_no_sweeps_at_first(server: Server) -> None:
    assert (await server.ask("GET", SWEEPS)).json() == {"sweeps": []}
