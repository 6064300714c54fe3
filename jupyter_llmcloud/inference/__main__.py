"""`python -m jupyter_llmcloud.inference`: reads a line of JSON from stdin, is that replica until it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from jupyter_llmcloud import config
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.inference.core_allocation import claim_cores
from jupyter_llmcloud.inference.replica import Replica, ReplicaSpec


def main() -> int:
    """Run the replica that stdin describes; returns the exit status."""
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)
    try:
        spec = ReplicaSpec.parse(sys.stdin.buffer.readline())
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if spec.cores:
        claimed = claim_cores(config.runtime_dir() / "cores", spec.cores)
        logging.getLogger(__name__).info("runs on the cores %s of %d", claimed, spec.cores)
    # Before torch and transformers are imported: they read these once. In a fork of the zygote they are imported, and
    # what they have read is set beside it: threads by torch itself, where a model is loaded.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(spec.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if (hub := sys.modules.get("huggingface_hub.constants")) is not None:
        hub.HF_HUB_OFFLINE = hub.HF_HUB_DISABLE_PROGRESS_BARS = True  # type: ignore[attr-defined]
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)
    try:
        return asyncio.run(_run(spec))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2


async def _run(spec: ReplicaSpec) -> int:
    status = await Replica(spec).run(sys.stdin.fileno())
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread that still loads a model, or an engine stuck in a step, must not keep the process alive.
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
