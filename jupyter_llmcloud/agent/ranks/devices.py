"""What this host can hold: one slot for each GPU, or slots on the CPU that share its cores."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter

import psutil

from jupyter_llmcloud.agent.ranks.device_locks import DeviceLocks
from jupyter_llmcloud.errors import Busy, UsageError

MIN_CPU_SLOTS = 8  # more ranks than cores are slow but useful: to try a cell that will run on eight GPUs


def visible_gpus() -> list[str]:
    """Identifiers of the GPUs this process may use, as in CUDA_VISIBLE_DEVICES; found without importing torch."""
    if (allowed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part.strip() for part in allowed.split(",") if part.strip() and part.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(rows))] if listing.returncode == 0 else []


class Devices:
    """Slots of this agent and who holds them; `address` is where ranks of other hosts reach this one."""

    def __init__(self, num_slots: int | None = None, address: str = "127.0.0.1") -> None:
        self.gpus = visible_gpus()
        self.has_gpus = bool(self.gpus) and num_slots is None
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if num_slots is not None and num_slots < 1:
            raise UsageError(f"slots={num_slots}: a worker has at least one slot.")
        self.slots = (
            self.gpus if self.has_gpus else [str(i) for i in range(num_slots or max(MIN_CPU_SLOTS, self.cores))]
        )
        self._held: dict[str, list[str]] = {}
        self._locks = DeviceLocks()
        self.loopback = "lo0" if sys.platform == "darwin" else "lo"
        self.address = address
        self.is_closed = False  # nobody may have more slots, since the host will be taken away

    @property
    def free(self) -> list[str]:
        """The slots that somebody may have, in order."""
        if self.is_closed:
            return []
        held = {slot for slots in self._held.values() for slot in slots}
        free = [slot for slot in self.slots if slot not in held]
        return [slot for slot in free if self._locks.is_free(slot)] if self.has_gpus else free

    @property
    def held(self) -> dict[str, int]:
        """How many slots each world has here, over all groups of its ranks (`world#5f1c09aa`)."""
        held: Counter[str] = Counter()
        for group, slots in self._held.items():
            held[group.partition("#")[0]] += len(slots)
        return dict(held)

    def take(self, world_id: str, number: int) -> list[str]:
        """Slots for a world: all of them, or Busy."""
        free = self.free
        if len(free) < number:
            raise Busy(f"{number} slots asked for, {len(free)} of {len(self.slots)} are free on this worker.")
        taken = free[:number]
        if self.has_gpus and not all([self._locks.lock(slot) for slot in taken]):
            self._locks.release(taken)
            raise Busy(f"{number} GPUs asked for, and another cluster of yours has just taken one of them.")
        self._held[world_id] = taken
        return taken

    def give_back(self, world_id: str, keep: int = 0) -> None:
        """The world holds nothing any more, or only its first `keep` slots."""
        held = self._held.pop(world_id, [])
        self._locks.release(held[keep:])
        if held[:keep]:
            self._held[world_id] = held[:keep]

    @staticmethod
    def interface_with(address: str) -> str:
        """Name of the network interface that has this address, for gloo and NCCL; "" when none has."""
        for name, addresses in psutil.net_if_addrs().items():
            if any(item.address == address for item in addresses):
                return name
        return ""

    def threads_per_rank(self, num_ranks: int) -> int:
        """Cores shared evenly, at least one."""
        return max(1, self.cores // num_ranks)
