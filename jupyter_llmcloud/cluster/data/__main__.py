"""The process that carries partitions out, a child of a Dask worker: requests on standard input, replies on `--reply`.

    python -m jupyter_llmcloud.cluster.data FD

A request is a length and cloudpickle's bytes: first a Recipe, then (method of PartitionWork, arguments) each. A reply
is a length and pickle's bytes: (True, result) or (False, the error as `rpc.refusal_body` gives it).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import sys
import threading
from typing import Any

from jupyter_llmcloud.cluster.data.worker_process import IDLE_S, IDLE_STATUS, read_message, write_message
from jupyter_llmcloud.errors import LLMCloudError, UsageError
from jupyter_llmcloud.protocol.client import is_ready
from jupyter_llmcloud.protocol.rpc import refusal_body


def main() -> None:
    """Until standard input ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core: no threads beside it
    from jupyter_llmcloud.cluster.data.work import PartitionWork

    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(int(sys.argv[1]), "wb")
    threading.Thread(target=_end_with_worker, args=[requests.fileno()], daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    work: Any = None
    with contextlib.suppress(EOFError):
        while True:
            if not is_ready([requests.fileno()], select.POLLIN, IDLE_S):
                os._exit(IDLE_STATUS)  # whoever began the preparation is gone
            request = pickle.loads(read_message(requests))
            try:
                if work is None:
                    work, result = PartitionWork(request), None
                else:
                    method, arguments = request
                    result = getattr(work, method)(*arguments)
                reply = True, result
            except LLMCloudError as error:
                reply = False, refusal_body(error)
            except MemoryError:
                reply = (
                    False,
                    refusal_body(UsageError("a partition does not fit in memory: use a smaller partition_size.")),
                )
            except Exception as error:
                reply = False, refusal_body(UsageError(f"a partition failed with {type(error).__name__}: {error}"))
            write_message(replies, pickle.dumps(reply))


def _end_with_worker(requests: int) -> None:
    """End as soon as the worker has: its partition is carried out again by another one."""
    poll = select.poll()
    poll.register(requests, 0)  # a pipe whose writer is gone is told without being asked for
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
