"""Warnings are told as such, so that the notebook can show once what every rank says, however far apart."""

from __future__ import annotations

import logging
import warnings
from typing import Any, TextIO

from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.output.sender import OutputSender, RankStream


def install(sender: OutputSender) -> None:
    """Tell the warnings of this process to its sender: those of `warnings`, and what is logged as one."""
    patches.WARNINGS.apply(
        {
            "warnings:showwarning": lambda original: _showwarning(original, sender),
            "logging:StreamHandler.emit": lambda original: _emit(original, sender),
        }
    )


def _showwarning(original: Any, sender: OutputSender) -> Any:
    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is not None or sender.forked:
            original(message, category, filename, lineno, file, line)
        else:
            sender.warning("stderr", warnings.formatwarning(message, category, filename, lineno, line))

    return showwarning


def _emit(original: Any, sender: OutputSender) -> Any:
    def emit(self: Any, record: logging.LogRecord) -> None:
        kind = None if sender.forked or record.levelno != logging.WARNING else _kind_of(self.stream)
        if kind is None:
            original(self, record)
            return
        try:
            sender.warning(kind, self.format(record) + self.terminator)
        except RecursionError:
            raise
        except Exception:
            self.handleError(record)

    return emit


def _kind_of(stream: Any) -> str | None:
    """Which stream of the cell it is; a handler made before the fork has the descriptor."""
    if isinstance(stream, RankStream):
        return stream.kind
    try:
        return {1: "stdout", 2: "stderr"}.get(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
