"""The end of this kernel, told apart from a Stop.

Jupyter interrupts a kernel before it restarts it or shuts it down, by the same signal as a Stop; the request itself
follows within milliseconds on the control channel, which ipykernel reads in a thread of its own. So a press counts only
when no such request has come for a moment. The request also says whether another kernel will follow for this notebook.
"""

from __future__ import annotations

import atexit
import os
import select
from collections.abc import Callable
from typing import Any

from jupyter_llmcloud.protocol.client import is_ready

HOLD_S = 0.25  # how long a press waits for the request that would explain it


class KernelShutdown(Exception):
    """Raised where a cell follows a run, when the kernel is about to end. It is caught by the cell."""


class KernelEnd:
    """Whether this kernel was asked to end. One per process.

    A pipe, not an event: it is waited for in a handler of a signal, which may come while a lock is taken.

    Attributes:
        message: what is happening, once it was asked to.
    """

    def __init__(self) -> None:
        self._asked, self._write = os.pipe()
        self._is_watched = False
        self._can_be_asked = False
        self.message = ""

    def watch(self, shell: Any, on_end: Callable[[bool], None]) -> None:
        """Call `on_end(restart)` when the kernel is asked to end, in the thread that hears it; once in a process.

        Without a kernel (IPython in a terminal, a script) it is called when the process ends.
        """
        if self._is_watched:
            return
        self._is_watched = True
        kernel = getattr(shell, "kernel", None)
        if kernel is None:
            atexit.register(on_end, False)
            return
        self._can_be_asked = True
        shut_down = kernel.do_shutdown  # the method that ipykernel gives kernels to override

        def do_shutdown(restart: bool) -> Any:
            self.message = "This kernel is being restarted." if restart else "This kernel is being shut down."
            os.write(self._write, b".")
            on_end(bool(restart))
            return shut_down(restart)

        kernel.do_shutdown = do_shutdown

    def is_near(self, within_s: float = 0.0) -> bool:
        """Whether the kernel was asked to end, or is within this time. May be called in a handler of a signal."""
        return is_ready([self._asked], select.POLLIN, within_s)

    def explains_press(self) -> bool:
        """Whether the interrupt that has just come belongs to the end of the kernel: then it is no Stop."""
        return self._can_be_asked and self.is_near(HOLD_S)


kernel_end = KernelEnd()
