"""A line of text in a cell that says how far something is."""

from __future__ import annotations

from typing import Any


class ProgressLine:
    """A line of text in the cell, replaced as it goes on and by the result in the end."""

    def __init__(self) -> None:
        self.handle: Any = None
        self._said = False

    def tell(self, text: str) -> None:
        """Show `text` in place of what was shown before; a terminal cannot replace, and gets the first one."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        data = {"text/plain": text}
        if self.handle is not None:
            self.handle.update(data, raw=True)
        elif getattr(get_ipython(), "kernel", None) is not None:
            self.handle = display(data, raw=True, display_id=True)
        elif not self._said:
            self._said = True
            print(text)
