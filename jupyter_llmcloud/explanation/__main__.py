"""`python -m jupyter_llmcloud.explanation FD`: reads a request from stdin, writes what it finds to descriptor FD."""

from __future__ import annotations

import os
import sys

from jupyter_llmcloud.protocol.explanation import ExplainRequest, Request
from jupyter_llmcloud.protocol.model_work import Tell, answer_one


def _work(request: Request, tell: Tell) -> None:
    os.environ["MPLBACKEND"] = "Agg"  # captum imports pyplot
    if isinstance(request, ExplainRequest):
        from jupyter_llmcloud.explanation.explaining import explain

        explain(request, tell)
    else:
        from jupyter_llmcloud.explanation.trying import try_model

        try_model(request, tell)


if __name__ == "__main__":
    sys.exit(answer_one(Request, _work))
