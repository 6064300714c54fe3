"""LitServe with batches of at most so many requests. Arguments: the folder of a model, a port, how many."""

import sys
from collections.abc import Iterator
from typing import Any

import litserve
import litserve.server
from static_batches import StaticBatches


class Completions(litserve.LitAPI):
    """One worker with the model."""

    def setup(self, device: str) -> None:
        """Load it, in the worker."""
        self.batches = StaticBatches(sys.argv[1])

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body is what the model takes."""
        return request

    def predict(self, batch: list[dict[str, Any]]) -> Iterator[list[str]]:
        """The events of a batch, step by step."""
        yield from self.batches.stream(batch)

    def encode_response(self, output: Iterator[list[str]]):  # FastAPI reads its annotation
        """They are text already."""
        yield from output


# LitServe 0.2 offers tools by mcp wherever that is installed, and knows its first version only.
litserve.server._MCP_AVAILABLE = False

if __name__ == "__main__":
    _, _, port, num_parallel = sys.argv
    api = Completions(max_batch_size=int(num_parallel), batch_timeout=0.01, stream=True, api_path="/v1/completions")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=300)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, num_api_servers=1)
