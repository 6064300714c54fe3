"""A program that tells what it finds where it runs: on its standard output, once it has read a line; then it waits.

It is among the kinds of `preloaded`, so that a test can compare one that was forked with one that was started.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from stat import S_IFMT

COMPARED = (
    *("argv", "orig_argv", "path", "environ", "cwd", "fds", "name", "file", "parent", "ignored", "interrupt", "umask"),
    *("limits", "affinity", "flags", "modules", "line", "frames", "leads"),
)


def fds() -> dict[str, str]:
    """The open descriptors, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            mode = os.fstat(int(name)).st_mode
        except OSError:  # that of the list itself
            continue
        found[name] = f"{S_IFMT(mode):o} inheritable={os.get_inheritable(int(name))}"
    return found


def frames() -> list[str]:
    frame, found = sys._getframe(), []
    while frame is not None:
        found.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return found[:4]  # what is below is the interpreter's


def ignored() -> str:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(line for line in file if line.startswith("SigIgn"))


def main() -> None:
    """Tell, and end by SIGTERM with status 5."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    told = {
        "pid": os.getpid(),
        "draws": [random.random(), random.Random().random()],
        "line": sys.stdin.readline(),
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "environ": dict(os.environ),
        "cwd": os.getcwd(),
        "fds": fds(),
        "name": __name__,
        "file": sys.modules["__main__"].__file__,
        "parent": os.getppid(),
        "ignored": ignored(),
        "interrupt": repr(signal.getsignal(signal.SIGINT)).split(" at ")[0],
        "umask": os.umask(0o22),
        "limits": [
            resource.getrlimit(limit) for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE)
        ],
        "affinity": sorted(os.sched_getaffinity(0)),
        "flags": repr(sys.flags),
        "modules": sorted(name for name in sys.modules if name.split(".")[0] not in sys.stdlib_module_names),
        "frames": frames(),
        "leads": os.getsid(0) == os.getpid(),
    }
    print(json.dumps(told), flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
