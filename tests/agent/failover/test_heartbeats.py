"""What is done every second for each world and each link goes on for the others when it fails for one."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.agent.failover.leader_link import LeaderLinks
from jupyter_llmcloud.agent.world.led_world import LedWorlds


class Beating:
    """A world or a link."""

    def __init__(self, error: Exception | None = None) -> None:
        self.num_beats = 0
        self._error = error

    def heartbeat(self, *_: Any) -> bool:
        self.num_beats += 1
        if self._error is not None:
            raise self._error
        return True


@pytest.mark.parametrize("kind", ["worlds", "links"])
def test_a_heartbeat_that_fails_is_told_and_holds_no_other_up(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    nobody: Any = None
    failing, well = Beating(OSError(28, "No space left on device")), Beating()
    if kind == "worlds":
        worlds = LedWorlds(nobody)
        worlds._worlds = {"a": failing, "b": well}  # type: ignore[dict-item]
        worlds.heartbeat(0.0)
        worlds.heartbeat(1.0)
    else:
        links = LeaderLinks(nobody, nobody)
        links._by_link = {"a": failing, "b": well}  # type: ignore[dict-item]
        links.heartbeat()
        links.heartbeat()
    assert (failing.num_beats, well.num_beats) == (2, 2)
    assert "No space left on device" in capsys.readouterr().err
