"""The end of a process that works on a model for one request: a line of JSON from stdin, lines of JSON to a descriptor.

It ends with whoever started it: that is seen by the end of stdin.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import msgspec

from jupyter_llmcloud.errors import LLMCloudError

Tell = Callable[[Any], None]


class WorkProgress(msgspec.Struct, kw_only=True, frozen=True, tag="progress"):
    """How far it is, in a few words."""

    text: str


class Failed(msgspec.Struct, kw_only=True, frozen=True, tag="failed"):
    """It cannot go on: the kind of an error of ours ("" for one of somebody else's), and what it says."""

    kind: str
    text: str


def answer_one(requests: Any, work: Callable[[Any, Tell], None]) -> int:
    """Do what is asked, and tell what happens to the descriptor that the command line names; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, _leave)
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=requests)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "wb", buffering=0) as out:
        try:
            work(request, lambda event: _write(out, event))
        except LLMCloudError as error:
            _write(out, Failed(kind=error.code, text=str(error)))
            return 1
        except Exception as error:
            logging.exception("failed")
            _write(out, Failed(kind="", text=f"{type(error).__name__}: {error}"))
            return 1
    return 0


def _write(out: Any, event: Any) -> None:
    line = memoryview(msgspec.json.encode(event) + b"\n")
    while line:  # a picture is longer than what a pipe takes at once
        line = line[out.write(line) :]


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not by the buffer, whose lock would be held when the process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)
