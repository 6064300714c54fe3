"""The loaders of a cell, by names that are the same when the cell is executed again."""

from __future__ import annotations

import weakref
from typing import Any

from jupyter_llmcloud.training.resume.loaders.order import order_of, set_order

_NUMBER = "_llmcloud_number"


class LoaderRegistry:
    """Names loaders by the order in which they were made, and knows those over which a pass has begun in the cell.

    Attributes:
        num_made: loaders made in the cell so far.
    """

    def __init__(self) -> None:
        self.num_made = 0
        self._num_cells = 0
        self._used: dict[str, weakref.ref[Any]] = {}
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._saved_orders: dict[str, dict[str, Any]] = {}  # of loaders that are not there yet

    def begin_cell(self) -> None:
        """A new cell."""
        self._num_cells += 1
        self.num_made = 0
        self._used = {}
        self._saved_orders = {}

    def number(self, loader: Any) -> None:
        """A loader has been made."""
        self.num_made += 1
        setattr(loader, _NUMBER, (self._num_cells, self.num_made))
        self._made.add(loader)

    def key_of(self, loader: Any) -> str:
        """The name of a loader. Each made in an earlier cell has one, too."""
        numbered = getattr(loader, "base_dataloader", loader)
        cell, number = getattr(numbered, _NUMBER, (0, 0))
        return f"new {number}" if cell == self._num_cells else f"old {cell} {number}"

    def use(self, loader: Any) -> str:
        """A pass over a loader begins; returns its name."""
        key = self.key_of(loader)
        self._used[key] = weakref.ref(loader)
        return key

    def used(self) -> dict[str, Any]:
        """The loaders over which a pass has begun, by name."""
        return {key: loader for key, ref in self._used.items() if (loader := ref()) is not None}

    def orders(self) -> dict[str, dict[str, Any]]:
        """What decides the order of each, in plain values."""
        return {**self._saved_orders, **{key: order_of(loader) for key, loader in self.used().items()}}

    def restore(self, num_made: int, orders: dict[str, dict[str, Any]]) -> None:
        """As many were made; each of `orders` has its order, or gets it when a pass over it begins.

        That of a loader which is there is set now: before the next pass the cell may give it another epoch.
        """
        self.num_made = num_made
        self._saved_orders = dict(orders)
        for key, loader in self._there().items():
            if (order := self._saved_orders.pop(key, None)) is not None:
                set_order(loader, order)

    def _there(self) -> dict[str, Any]:
        """The loaders that are alive, by name; one that others were put round by the outer one."""
        plain = {self.key_of(loader): loader for loader in self._made if not hasattr(loader, "base_dataloader")}
        outer = {self.key_of(loader): loader for loader in self._made if hasattr(loader, "base_dataloader")}
        return plain | outer | self.used()

    def restore_order(self, key: str) -> None:
        """The next pass over a loader has the saved order, unless one has begun since."""
        if (order := self._saved_orders.pop(key, None)) is not None:
            set_order(self._used[key](), order)
