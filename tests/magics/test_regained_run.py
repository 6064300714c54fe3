"""A run whose end a notebook has missed, by values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from jupyter_llmcloud.magics.session import world_client
from jupyter_llmcloud.magics.session.world_client import WorldClient
from jupyter_llmcloud.protocol.agent_messages import RunEnded


class _Missed:
    address = "/agent"

    def __init__(self, *_: Any) -> None: ...

    def regain(self) -> tuple[None, RunEnded]:
        return None, RunEnded(run_id="r-1", state="finished")


@pytest.mark.parametrize(("ranks", "first"), [([1, 2], 1), ([0, 1, 2], 0), ([], 0)])
def test_what_is_pulled_then_is_of_the_first_rank_that_has_run_it(
    ranks: list[int], first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_client, "Reconnection", _Missed)
    monkeypatch.setattr(WorldClient, "pull", lambda self, names, rank=0: dict.fromkeys(names, rank))
    world = WorldClient(SimpleNamespace(address="/agent", close=lambda: None), "w", "local", 3)  # type: ignore[arg-type]
    cell: Any = SimpleNamespace(run_id="r-1", max_restarts=0, pull=["x"], ranks=ranks)
    ended = world._regain(cell, None, None)  # type: ignore[arg-type]
    assert ended is not None and cloudpickle.loads(ended.payload) == {"x": first}
