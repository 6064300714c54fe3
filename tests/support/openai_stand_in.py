"""A server of others as we start it: speaks OpenAI's API, is slow to load, and misbehaves on request.

Started as `vllm serve FOLDER --host H --port P --served-model-name NAME ...` or `llama-server -m FILE --host ... --alias NAME`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from aiohttp import web


def option(*names: str) -> str:
    """The value behind the first of these options that is there."""
    return next(sys.argv[sys.argv.index(name) + 1] for name in names if name in sys.argv)


class Engine:
    """Answers with the words of the prompt."""

    def __init__(self) -> None:
        self.name = option("--served-model-name", "--alias")
        self.key = os.environ.get("VLLM_API_KEY") or os.environ["LLAMA_API_KEY"]
        self.num_probes = 0
        self.num_cancelled = 0

    async def health(self, _: web.Request) -> web.Response:
        """Loading at first."""
        self.num_probes += 1
        return web.Response(status=200 if self.num_probes > 2 else 503)

    def check(self, request: web.Request) -> None:
        """Nobody without the key."""
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            raise web.HTTPUnauthorized

    async def models(self, request: web.Request) -> web.Response:
        """The one model."""
        self.check(request)
        return web.json_response({"data": [{"id": self.name, "max_model_len": 512}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Do what the prompt says."""
        self.check(request)
        body = await request.json()
        if body["model"] != self.name:
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        prompt = body["prompt"]
        if prompt == "die":
            os._exit(7)
        if prompt == "bad":
            return web.json_response({"error": {"message": "temperature is wrong", "param": "temperature"}}, status=400)
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        if not body.get("stream"):
            choice = {"index": 0, "text": f"{prompt}!", "finish_reason": "stop"}
            return web.json_response({"id": "c", "model": self.name, "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for number in range(int(prompt.split()[1])):
                if prompt.startswith("die") and number == 2:
                    os._exit(7)
                await self._send(response, {"choices": [{"index": 0, "text": f"{number} "}]})
                await asyncio.sleep(0.01)
        except (asyncio.CancelledError, ConnectionError):
            self.num_cancelled += 1
            raise
        if (body.get("stream_options") or {}).get("include_usage"):
            await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        event = {"id": "c", "model": self.name, **event}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def stats(self, _: web.Request) -> web.Response:
        """For the test."""
        return web.json_response({"cancelled": self.num_cancelled, "argv": sys.argv[1:]})


def main() -> None:
    """Serve until ended."""
    if any(os.path.basename(word).startswith("broken") for word in sys.argv):
        print("ValueError: the weights are of no known kind", file=sys.stderr, flush=True)
        sys.exit(3)
    engine = Engine()
    app = web.Application()
    app.router.add_get("/health", engine.health)
    app.router.add_get("/stats", engine.stats)
    app.router.add_get("/v1/models", engine.models)
    app.router.add_post("/v1/completions", engine.complete)
    web.run_app(app, host=option("--host"), port=int(option("--port")), print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
