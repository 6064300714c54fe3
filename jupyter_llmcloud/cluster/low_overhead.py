"""A scheduler beside which others compute: it looks at its workers less often.

By default a worker reports twice a second and a scheduler looks for idleness eight times a second. Placement asks for
what it needs, and a worker that is lost is seen by its closed connection; so on a machine that trains, all of that is
taken from the ranks. Dask has settings for the rest, see `settings`.
"""

from __future__ import annotations

from typing import Any

from distributed import Scheduler, SchedulerPlugin

HEARTBEAT_S = 3.0
LOOK_S = 2.0
LOOKS = ("idle-timeout", "no-workers-timeout")
SYNC_S = 60.0  # how often a cluster object repeats what the scheduler already knows


class QuietPlugin(SchedulerPlugin):
    """Registered on the schedulers of clusters that we start."""

    name = "llmcloud-quiet"
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Called by Dask."""
        heard = scheduler.handlers["heartbeat_worker"]

        def heartbeat_worker(**report: Any) -> dict[str, Any]:
            answer: dict[str, Any] = heard(**report)
            if "heartbeat-interval" in answer:
                answer["heartbeat-interval"] = max(HEARTBEAT_S, answer["heartbeat-interval"])
            return answer

        scheduler.handlers["heartbeat_worker"] = heartbeat_worker
        for name in LOOKS:
            if (look := scheduler.periodic_callbacks.get(name)) is not None:
                look.callback_time = max(1000 * LOOK_S, look.callback_time)
