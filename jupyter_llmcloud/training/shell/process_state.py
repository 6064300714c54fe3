"""State of the whole process, which outlives a cell: what is taken back after it, and what a fresh one does without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jupyter_llmcloud.protocol.agent_messages import Execute
from jupyter_llmcloud.training.integrations.library_state import LibraryState
from jupyter_llmcloud.training.shell.isolation import Isolation


class ProcessState:
    """That of a rank, from cell to cell."""

    def __init__(self) -> None:
        self._libraries = LibraryState()
        self._isolation = Isolation()

    def install(self) -> None:
        """Take the present state as the one that cells begin with. Called once, in a rank."""
        self._libraries.install()
        self._isolation.install()

    def set_environment(self, values: Mapping[str, str]) -> None:
        """What the world says to its ranks; every cell finds it."""
        self._isolation.set_environment(values)

    def begin(self, cell: Execute, namespace: dict[str, Any], initial_names: set[str]) -> None:
        """A cell is about to be executed in `namespace`; `initial_names` of it are no cell's."""
        if cell.fresh:
            self._isolation.begin(namespace, initial_names)

    def end(self, namespace: dict[str, Any]) -> None:
        """It has ended, in whatever way."""
        self._libraries.take_back()
        self._isolation.end(namespace)
