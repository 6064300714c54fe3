"""A program that a fork of the zygote becomes: `python -m MODULE`, but with the libraries imported already.

What the zygote has set up for ranks (a shell, ignored signals, an environment) is no part of such a program.
"""

from __future__ import annotations

import builtins
import os
import runpy
import signal
import sys

from jupyter_llmcloud.protocol.rank_messages import ForkProgram


def run_program(request: ForkProgram, fds: list[int]) -> int:
    """Be the program until it ends; returns its exit status. `fds`: its standard input, output and error."""
    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request.env)
    _forget_shell()
    _draw_apart()
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _forget_shell() -> None:
    """Libraries look whether IPython runs, and would print as in a notebook."""
    from jupyter_llmcloud.training.shell.shell import RankShell

    if RankShell.initialized():
        RankShell.clear_instance()
    for name in ("__IPYTHON__", "display"):
        if hasattr(builtins, name):
            delattr(builtins, name)


def _draw_apart() -> None:
    """Forks of one process would draw the same random numbers; Python's own generator sees to that itself."""
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
