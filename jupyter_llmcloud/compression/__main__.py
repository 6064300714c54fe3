"""`python -m jupyter_llmcloud.compression FD`: reads a request from stdin, writes what happens to the descriptor FD.

It ends with whoever started it: that is seen by the end of stdin. What it was making is removed then.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import msgspec

from jupyter_llmcloud.errors import LLMCloudError
from jupyter_llmcloud.protocol.compression import (
    CompressRequest,
    Event,
    ExportRequest,
    Failed,
    MeasureRequest,
    Request,
)

Tell = Callable[[Event], None]


def main() -> int:
    """Do what is asked; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, _leave)
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=Request)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "wb", buffering=0) as out:

        def tell(event: Event) -> None:
            out.write(msgspec.json.encode(event) + b"\n")

        try:
            _work(request, tell)
        except LLMCloudError as error:
            tell(Failed(kind=error.code, text=str(error)))
            return 1
        except Exception as error:
            logging.exception("failed")
            tell(Failed(kind="", text=f"{type(error).__name__}: {error}"))
            return 1
    return 0


def _work(request: Request, tell: Tell) -> None:
    if isinstance(request, MeasureRequest):
        from jupyter_llmcloud.compression.measure.measuring import measure as work
    elif isinstance(request, ExportRequest):
        from jupyter_llmcloud.compression.export.exporting import export as work  # type: ignore[assignment]
    else:
        assert isinstance(request, CompressRequest)
        from jupyter_llmcloud.compression.making import make as work  # type: ignore[assignment]
    work(request, tell)  # type: ignore[arg-type]


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_with_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not by the buffer, whose lock would be held when the process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
