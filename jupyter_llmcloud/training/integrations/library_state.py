"""Process-wide state of libraries ends with the cell that made it, as it would with a script; variables stay.

Accelerate keeps singletons and writes to the environment, scripts install signal handlers. In a
rank the process goes on: what such state would decide in the next cell is taken back when a cell ends.
"""

from __future__ import annotations

import _signal
import gc
import os
import signal
import sys
import weakref
from collections.abc import Callable
from types import FrameType, GeneratorType
from typing import Any

from accelerate.state import GradientState

from jupyter_llmcloud.training import patches

_LIBRARIES = ("accelerate", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning", "transformers")
_NAMES = ("ACCELERATE_", "DEEPSPEED_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "PL_")
_BETWEEN = ("os", "_collections_abc", "collections.abc", "contextlib")  # modules on the way from a writer to os.environ
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
# Real-time signals, half of all, mean nothing by themselves, and to look at each after every cell takes time.
_REAL_TIME = range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if hasattr(signal, "SIGRTMIN") else range(0)
_SIGNALS = [number for number in signal.valid_signals() if number not in _REAL_TIME]


class LibraryState:
    """What the libraries of a rank keep beside the variables of its cells."""

    def __init__(self) -> None:
        self._environment = LibraryEnvironment()
        self._accumulation = Accumulation()
        self._handlers: dict[int, Any] = {}

    def install(self) -> None:
        """Look at it from now on, and take it as it is as the state that each cell begins with."""
        self._environment.install()
        self._accumulation.install()
        self._handlers = {int(number): _signal.getsignal(number) for number in _SIGNALS}

    def take_back(self) -> None:
        """A cell has ended, in whatever way."""
        self._environment.take_back()
        self._accumulation.take_back()
        for timer in _TIMERS:  # before the handlers: an alarm without its handler would end the process
            signal.setitimer(timer, 0)
        for number, handler in self._handlers.items():
            # Not by the module for people, whose names for numbers would take a tenth of the time of a short cell.
            if handler is not None and _signal.getsignal(number) is not handler:
                _signal.signal(number, handler)


class LibraryEnvironment:
    """Environment variables that a library has set while it served a cell; those that the cell sets itself stay."""

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}

    def install(self) -> None:
        """Look at who writes to `os.environ`. Called once, in a rank."""
        patches.ENVIRONMENT.apply(dict.fromkeys(patches.ENVIRONMENT.targets, self._noting))

    def _noting(self, original: Callable[..., None]) -> Callable[..., None]:
        def change(environ: Any, name: Any, *value: Any) -> None:
            if isinstance(name, str) and name.startswith(_NAMES):
                self._note(name, sys._getframe(1))
            original(environ, name, *value)

        return change

    def _note(self, name: str, frame: FrameType | None) -> None:
        while frame is not None and (module := str(frame.f_globals.get("__name__"))) in _BETWEEN:
            frame = frame.f_back
        writer = module.partition(".")[0] if frame is not None else ""
        if writer in _LIBRARIES:
            self._before.setdefault(name, os.environ.get(name))
        elif writer != __name__.partition(".")[0]:
            self._before.pop(name, None)  # it is the cell's own now

    def take_back(self) -> None:
        """Set what libraries have set to what it was before."""
        before, self._before = self._before, {}
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Accumulation:
    """Accelerate's state of gradient accumulation, which all Accelerators of a process share.

    A cell that ends inside a window would keep the next one's optimizers from stepping. In a cell that makes no
    Accelerator, the one that it uses has the number of steps that it was made with, whatever others were made since.
    """

    def __init__(self) -> None:
        self._own: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self._is_new = False  # the cell has made an Accelerator

    def install(self) -> None:
        """Look at Accelerators. Called once, in a rank."""
        patches.ACCUMULATION.apply(
            {
                "accelerate:Accelerator.__init__": self._noting_made,
                "accelerate:Accelerator.accumulate": self._with_own_steps,
                "accelerate:Accelerator.backward": self._with_own_steps,
            }
        )

    def _noting_made(self, original: Callable[..., None]) -> Callable[..., None]:
        accumulation = self

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            accumulation._note_made(self)

        return __init__

    def _note_made(self, accelerator: Any) -> None:
        self._is_new = True
        # A dictionary of its own, which Accelerate and the Trainer change in place.
        accelerator.gradient_state.plugin_kwargs = dict(accelerator.gradient_state.plugin_kwargs)
        self._own[accelerator] = accelerator.gradient_state.plugin_kwargs

    def _with_own_steps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def use(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._is_new and (own := self._own.get(accelerator)) is not None:
                accelerator.gradient_state.plugin_kwargs = own
            return original(accelerator, *args, **kwargs)

        return use

    def take_back(self) -> None:
        """The next cell begins outside of a window and of a loader."""
        self._is_new = False
        if GradientState._shared_state:
            state = GradientState()
            state._set_sync_gradients(True)
            state.dataloader_references = [
                loader for loader in state.dataloader_references if loader is None or _is_iterated(loader)
            ]


def _is_iterated(loader: Any) -> bool:
    """Whether a variable still holds an iterator of this loader, which the next cell may draw from."""
    return any(isinstance(user, GeneratorType) and user.gi_frame is not None for user in gc.get_referrers(loader))
