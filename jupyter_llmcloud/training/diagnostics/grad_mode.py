"""Does the main thread compute without gradients? Only its own thread can ask torch; here it leaves word for others."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch

_MODES = (torch.no_grad, torch.inference_mode)


class WithoutGradients:
    """Counts how deep the main thread is in `torch.no_grad` and `torch.inference_mode` blocks."""

    def __init__(self) -> None:
        self.depth = 0

    def watch(self) -> None:
        """Count from now on. Called once, in a rank."""
        for mode in _MODES:
            self._count(mode)

    def _count(self, mode: Any) -> None:
        enter, leave = mode.__enter__, mode.__exit__
        main = threading.main_thread().ident

        @functools.wraps(enter)
        def __enter__(block: Any) -> Any:
            if threading.get_ident() == main:
                self.depth += 1
            return enter(block)

        @functools.wraps(leave)
        def __exit__(block: Any, *error: Any) -> Any:
            if threading.get_ident() == main:
                self.depth -= 1
            return leave(block, *error)

        mode.__enter__, mode.__exit__ = __enter__, __exit__
