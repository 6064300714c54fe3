"""A program for a fork: says on its standard output what it finds, once it has read a line; exit status 7."""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys


def main() -> int:
    """Tell."""
    line = sys.stdin.buffer.readline()
    IPython = sys.modules.get("IPython")
    numpy = sys.modules.get("numpy")
    told = {
        "line": line.decode(),
        "name": __name__,
        "main": sys.modules["__main__"].__file__,
        "environment": dict(os.environ),
        "shell": IPython is not None and IPython.get_ipython() is not None,
        "builtins": [name for name in ("get_ipython", "display", "__IPYTHON__") if hasattr(builtins, name)],
        "default_signals": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "draw": numpy is not None and numpy.random.randint(1 << 30),
        "leads": os.getsid(0) == os.getpid(),
    }
    print(json.dumps(told))
    return 7


if __name__ == "__main__":
    sys.exit(main())
