"""The side thread of a rank goes on looking, whatever it finds: without it the rank would be told to hang."""

from __future__ import annotations

import io
import os
import queue
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.training.diagnostics import activity
from jupyter_llmcloud.training.diagnostics.watchdog import Watchdog


class Sender:
    def __init__(self) -> None:
        self.sent: queue.Queue[Any] = queue.Queue()

    def send(self, message: Any) -> None:
        self.sent.put(message)


def test_looks_that_fail_are_told_once_and_followed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", told)
    sender: Any = Sender()
    dog = Watchdog(sender, lambda: 0, lambda _: None)
    looks: list[int] = []

    def state() -> dict[str, Any]:
        looks.append(1)
        if len(looks) <= 2:
            raise RuntimeError("dictionary changed size during iteration")
        return {}

    monkeypatch.setattr(dog.collectives, "state", state)
    monkeypatch.setattr(dog.collectives, "watch", lambda: None)
    monkeypatch.setattr(dog._without_gradients, "watch", lambda: None)
    dog.start()
    dog.begin("r", floor_s=0.5)
    try:
        assert sender.sent.get(timeout=20).run_id == "r"
        assert told.getvalue().count("Traceback") == 1  # of two
    finally:
        dog.end()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="the names of processes are Linux's")
def test_a_child_whose_name_is_cut_within_a_character_is_counted() -> None:
    pid = os.fork()
    if not pid:
        with open("/proc/self/comm", "wb") as file:
            file.write("données-entraînement".encode()[:15])
        time.sleep(60)
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while b"donn" not in Path(f"/proc/{pid}/comm").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert activity._children_cpu() >= 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
