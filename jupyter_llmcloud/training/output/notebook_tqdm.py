"""`tqdm.notebook` on a rank: its widgets would have nobody to talk to, so its bars are those of a terminal."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable
from typing import Any

from tqdm.std import tqdm as TextBar

from jupyter_llmcloud.training import patches


class NotebookBar(TextBar):
    """A text bar that takes the options of a notebook's."""

    def __init__(self, *args: Any, display: bool = True, **kwargs: Any) -> None:
        if not display:
            kwargs["disable"] = True
        ncols = kwargs.get("ncols")
        if isinstance(ncols, str):  # a notebook's may be "100%" or "300px"
            kwargs["ncols"] = None
        super().__init__(*args, **kwargs)


def bar_of_range(*args: int, **kwargs: Any) -> Iterable[int]:
    """`tqdm(range(*args))`."""
    return NotebookBar(range(*args), **kwargs)


def install() -> None:
    """Stand in for the module in this process."""
    module: Any = types.ModuleType("tqdm.notebook", __doc__)
    module.tqdm = module.tqdm_notebook = NotebookBar
    module.trange = module.tnrange = bar_of_range
    module.IProgress = object  # tqdm.autonotebook asks whether there are widgets
    module.WARN_NOIPYW = ""
    module.__all__ = ["tnrange", "tqdm", "tqdm_notebook", "trange"]
    patches.NOTEBOOK_BARS.apply({"tqdm.notebook": lambda _: module})


def draw_open_bars() -> None:
    """Draw the last steps of bars that nobody closes: a bar is drawn ten times a second at most."""
    instances = getattr(TextBar, "_instances", ())
    for bar in list(instances) if instances else ():
        if bar.n != bar.last_print_n and not bar.disable:
            with contextlib.suppress(Exception):  # what it writes to may be closed
                bar.refresh()


def forget_open_bars() -> None:
    """Keep no lines for bars that earlier cells have left open: a new bar is drawn below those that there are."""
    getattr(TextBar, "_instances", set()).clear()
