"""Locks on the GPUs of this host: two clusters of one user, or two workers on one host, must not use the same one."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable

from jupyter_llmcloud import config


class DeviceLocks:
    """A lock file for each device, below the runtime folder; the system releases it when this process ends."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def lock(self, device: str) -> bool:
        """Take a device; False when another process has it."""
        if device in self._held:
            return True
        folder = config.runtime_dir() / "devices"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / re.sub(r"[^\w.-]", "_", device)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._held[device] = descriptor
        return True

    def release(self, devices: Iterable[str]) -> None:
        """Give devices back."""
        for device in devices:
            if (descriptor := self._held.pop(device, None)) is not None:
                os.close(descriptor)

    def is_free(self, device: str) -> bool:
        """Whether no process holds it now."""
        if device in self._held or not self.lock(device):
            return False
        self.release([device])
        return True
