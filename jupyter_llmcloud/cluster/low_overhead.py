"""A scheduler beside which others compute: it looks at its workers less often.

By default a worker reports twice a second and a scheduler looks for idleness eight times a second. Placement asks for
what it needs, and a worker that is lost is seen by its closed connection; so on a machine that trains, all of that is
taken from the ranks. Dask has settings for the rest, see `settings`.
"""

from __future__ import annotations

import logging
from typing import Any

from distributed import Scheduler, SchedulerPlugin

from jupyter_llmcloud.system.patching import Patch, alike

log = logging.getLogger(__name__)

HEARTBEAT_S = 3.0
LOOK_S = 2.0
LOOKS = ("idle-timeout", "no-workers-timeout")
SYNC_S = 60.0  # how often a cluster object repeats what the scheduler already knows


HEARTBEATS = Patch(
    feature="Fewer heartbeats of Dask workers",
    why="A scheduler tells its workers how often to report, by their number; no setting changes that.",
    without="Workers report twice a second; nothing else changes.",
    checked="distributed 2026.1.1 to 2026.8",
    targets={"distributed:Scheduler.heartbeat_worker": ()},
)


class LowOverheadPlugin(SchedulerPlugin):
    """Registered on the schedulers of clusters that we start."""

    name = "llmcloud-quiet"
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Called by Dask."""
        self._look_less_often(scheduler)
        heard = scheduler.handlers.get("heartbeat_worker")
        if heard is None or (problem := HEARTBEATS.problem()):
            log.warning("%s", problem if heard is not None else HEARTBEATS.without)
            return

        def heartbeat_worker(**report: Any) -> dict[str, Any]:
            answer: dict[str, Any] = heard(**report)
            if "heartbeat-interval" in answer:
                answer["heartbeat-interval"] = max(HEARTBEAT_S, answer["heartbeat-interval"])
            return answer

        scheduler.handlers["heartbeat_worker"] = alike(heartbeat_worker, heard)

    def _look_less_often(self, scheduler: Scheduler) -> None:
        for name in LOOKS:
            if (look := scheduler.periodic_callbacks.get(name)) is not None:
                look.callback_time = max(1000 * LOOK_S, look.callback_time)
