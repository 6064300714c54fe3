"""Ray Serve with batches of at most so many requests. Arguments: the folder of a model, a port, how many."""

import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse

_, FOLDER, PORT, NUM_PARALLEL = sys.argv
BODIES = str(Path(__file__).parent)


@serve.deployment(max_ongoing_requests=2 * int(NUM_PARALLEL), ray_actor_options={"num_cpus": 1})
class Completions:
    """One replica with the model."""

    def __init__(self, folder: str) -> None:
        from static_batches import StaticBatches

        self.batches = StaticBatches(folder)

    @serve.batch(max_batch_size=int(NUM_PARALLEL), batch_wait_timeout_s=0.01)
    async def events(self, requests: list[dict[str, Any]]) -> AsyncIterator[list[str]]:
        """The events of a batch, step by step."""
        for step in self.batches.stream(requests):
            yield step

    async def __call__(self, request: Request) -> Any:
        """Stream the answer to one request; anything else is asked whether it is there."""
        if request.method == "GET":
            return PlainTextResponse("ready")
        return StreamingResponse(self.events(await request.json()), media_type="text/event-stream")


ray.init(
    num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20,
    runtime_env={"env_vars": {"PYTHONPATH": BODIES, "OMP_NUM_THREADS": "1"}},
)  # fmt: skip
serve.start(http_options={"host": "127.0.0.1", "port": int(PORT)})
serve.run(Completions.bind(FOLDER), route_prefix="/")
signal.sigwait({signal.SIGTERM, signal.SIGINT})
serve.shutdown()
ray.shutdown()
