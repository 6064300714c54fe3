"""A bar for work that the server does: in the cell, or in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of tqdm, which knows where it is shown; call what it gives with (done, all)."""
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=f" {unit}") as bar:

        def show(done: int, _: int) -> None:
            bar.update(done - bar.n)

        yield show
