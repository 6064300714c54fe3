"""Does the main thread compute without gradients? Only its own thread can ask torch; here it leaves word for others."""

from __future__ import annotations

import threading
from typing import Any

from jupyter_llmcloud.training import patches


class WithoutGradients:
    """Counts how deep the main thread is in `torch.no_grad` and `torch.inference_mode` blocks."""

    def __init__(self) -> None:
        self.depth = 0

    def watch(self) -> None:
        """Count from now on. Called once, in a rank."""
        modes = ("torch:no_grad", "torch:inference_mode")
        patches.GRAD_MODES.apply(
            {f"{mode}.__enter__": self._make_enter for mode in modes}
            | {f"{mode}.__exit__": self._make_exit for mode in modes}
        )

    def _make_enter(self, enter: Any) -> Any:
        main = threading.main_thread().ident

        def __enter__(block: Any) -> Any:
            if threading.get_ident() == main:
                self.depth += 1
            return enter(block)

        return __enter__

    def _make_exit(self, leave: Any) -> Any:
        main = threading.main_thread().ident

        def __exit__(block: Any, *error: Any) -> Any:
            if threading.get_ident() == main:
                self.depth -= 1
            return leave(block, *error)

        return __exit__
