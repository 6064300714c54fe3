"""`python -m jupyter_llmcloud.compression FD`: reads a request from stdin, writes what happens to the descriptor FD.

What it was making is removed when it is ended.
"""

from __future__ import annotations

import sys

from jupyter_llmcloud.protocol.compression import CompressRequest, ExportRequest, MeasureRequest, Request
from jupyter_llmcloud.protocol.model_work import Tell, answer_one


def _work(request: Request, tell: Tell) -> None:
    if isinstance(request, MeasureRequest):
        from jupyter_llmcloud.compression.measure.measuring import measure

        measure(request, tell)
    elif isinstance(request, ExportRequest):
        from jupyter_llmcloud.compression.export.exporting import export

        export(request, tell)
    else:
        assert isinstance(request, CompressRequest)
        from jupyter_llmcloud.compression.making import make

        make(request, tell)


if __name__ == "__main__":
    sys.exit(answer_one(Request, _work))
