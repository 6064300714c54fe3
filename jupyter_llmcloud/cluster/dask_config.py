"""Dask settings for clusters that we start, and why: Dask places and watches, it must never kill or move training."""

from __future__ import annotations

from typing import Any

DASK_SETTINGS: dict[str, Any] = {
    "distributed.worker.daemon": False,  # a worker starts the node agent
    "distributed.worker.memory.target": False,  # the memory manager would kill a worker, not see its ranks
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.scheduler.worker-ttl": None,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.deploy.lost-worker-timeout": "120s",
    "distributed.comm.timeouts.connect": "60s",
    "distributed.comm.timeouts.tcp": "60s",
    "distributed.worker.profile.enabled": False,
    "distributed.client.scheduler-info-interval": "30s",
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.admin.tick.interval": "2s",  # by default it looks at its own loop 50 times a second
    "distributed.admin.tick.cycle": "10s",
}
TLS_SETTINGS: dict[str, Any] = {"distributed.comm.require-encryption": True}
