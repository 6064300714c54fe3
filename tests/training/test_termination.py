"""SIGTERM to what a rank forks."""

from __future__ import annotations

import subprocess
import sys

FORKS = """
import os, signal, time
from jupyter_llmcloud.training.termination import Termination

Termination().install()
ended = []
for turn in range(100):
    child = os.fork()
    if child == 0:
        time.sleep(60)  # it is told to end in its first instant
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    until = time.monotonic() + 5
    while time.monotonic() < until and not (found := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.0005)
    if not found[0]:
        os.kill(child, signal.SIGKILL)
        found = os.waitpid(child, 0)
    ended.append(os.WTERMSIG(found[1]))
    if ended[-1] != signal.SIGTERM:
        break
print(len(ended), ended[-1], signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_a_child_that_is_told_to_end_at_its_first_instant_does() -> None:
    told = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout == "100 15 set()\n"
