"""Warnings are told as such, so that the notebook can show once what every rank says, however far apart."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, TextIO

import jupyter_llmcloud
from jupyter_llmcloud.training import patches
from jupyter_llmcloud.training.output.sender import OutputSender, RankStream

_OUR_FILES = os.path.join(os.path.dirname(jupyter_llmcloud.__file__), "")


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
        if _is_about_us(category, filename):
            return
        if file is not None or sender.forked:
            original(message, category, filename, lineno, file, line)
        else:
            sender.warning("stderr", warnings.formatwarning(message, category, filename, lineno, line))

    return showwarning


def _is_about_us(category: type[Warning], filename: str) -> bool:
    """Whether it tells who wrote the code that something will change, and that code is ours.

    We look at every variable of a cell, among them names such as `torch.distributed.reduce_op` (by `import *`) that
    warn whoever asks what they are.
    """
    is_for_authors = issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning)
    return is_for_authors and filename.startswith(_OUR_FILES)


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
