"""Warnings are told as such, so that the notebook can show once what every rank says, however far apart."""

from __future__ import annotations

import logging
import warnings
from typing import Any, TextIO

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.output.sender import Outlet, StreamToOutlet


def install(outlet: Outlet) -> None:
    """Tell the warnings of this process to its outlet: those of `warnings`, and what is logged as one."""
    patches.WARNINGS.apply(
        {
            "warnings:showwarning": lambda original: _showwarning(original, outlet),
            "logging:StreamHandler.emit": lambda original: _emit(original, outlet),
        }
    )


def _showwarning(original: Any, outlet: Outlet) -> Any:
    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is not None or outlet.forked:
            original(message, category, filename, lineno, file, line)
        else:
            outlet.warning("stderr", warnings.formatwarning(message, category, filename, lineno, line))

    return showwarning


def _emit(original: Any, outlet: Outlet) -> Any:
    def emit(self: Any, record: logging.LogRecord) -> None:
        kind = None if outlet.forked or record.levelno != logging.WARNING else _kind_of(self.stream)
        if kind is None:
            original(self, record)
            return
        try:
            outlet.warning(kind, self.format(record) + self.terminator)
        except RecursionError:
            raise
        except Exception:
            self.handleError(record)

    return emit


def _kind_of(stream: Any) -> str | None:
    """Which stream of the cell it is; a handler made before the fork has the descriptor."""
    if isinstance(stream, StreamToOutlet):
        return stream.kind
    try:
        return {1: "stdout", 2: "stderr"}.get(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
