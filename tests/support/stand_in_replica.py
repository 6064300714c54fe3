"""A replica without a model: answers as one does, and misbehaves on request.

Started like a replica, with its spec as one line of JSON on standard input. The prompt tells it what to do:
`count N` streams N pieces, `wait` never answers, `endless` streams for ever, `die` ends the process before it answers,
`die after N` does so in the middle of a stream, `end after N` ends the stream there without a word, `busy` is a 503,
`headers` answers the headers of the request, `flood N` streams N large pieces as fast as they are taken, `stamp N MS`
streams N times of sending, MS apart, `slow MS` answers after so long. All else is echoed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

_USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


class StandIn:
    """One process, one socket."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.num_cancelled = 0
        self.num_asked = 0
        self.num_active = 0
        self.ended: set[str] = set()
        self.is_ready = asyncio.Event()
        self.adapters: set[str] = set(spec.get("adapters", ()))

    @web.middleware
    async def check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Nobody without the token."""
        if request.headers.get("Authorization") != f"Bearer {self.spec['token']}":
            return web.json_response({}, status=401)
        return await handler(request)

    async def readyz(self, _: web.Request) -> web.Response:
        """As the model folder says: a file `broken` in it cannot be loaded."""
        if os.path.exists(os.path.join(self.spec["model"], "broken")):
            asyncio.get_running_loop().call_later(1, os._exit, 1)
            return web.json_response({"state": "failed", "reason": "the weights are of another shape"}, status=500)
        if os.path.exists(os.path.join(self.spec["model"], "slow")):
            return web.json_response({"state": "loading"}, status=503)
        ready = {"state": "ready", "max_concurrent": self.spec.get("max_concurrent", 32)}
        if self.spec.get("max_model_len"):
            ready |= {"context_length": self.spec["max_model_len"], "num_threads": self.spec["num_threads"]}
            ready |= {"num_parallel": self.spec["max_concurrent"], "engine": "stand-in"}
            ready["memory"] = {"process_bytes": 300 << 20, "cache_bytes": 64 << 20, "max_cache_bytes": 5 << 30}
        if os.path.exists(os.path.join(self.spec["model"], "no adapters")):
            ready["adapters_refused"] = dict.fromkeys(self.adapters, "they do not fit")
        return web.json_response(ready)

    async def stats(self, _: web.Request) -> web.Response:
        """What happened so far."""
        told = {"cancelled": self.num_cancelled, "asked": self.num_asked, "active": self.num_active}
        return web.json_response({**told, "pid": os.getpid(), "adapters": sorted(self.adapters)})

    async def reload(self, request: web.Request) -> web.Response:
        """Take the weights of another folder, unless a file `keeps` in it says that they do not fit."""
        body = await request.json()
        if os.path.exists(os.path.join(body["model"], "keeps")):
            return web.json_response({"error": {"message": "they do not fit"}}, status=409)
        self.spec["model"] = body["model"]
        return web.json_response({"revision": body["revision"]})

    async def set_adapter(self, request: web.Request) -> web.Response:
        """Load an adapter, or take it away."""
        body = await request.json()
        (self.adapters.add if body["folder"] else self.adapters.discard)(body["name"])
        return web.json_response({"adapters": sorted(self.adapters)})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Do what the prompt says."""
        body = await request.json()
        self.num_asked += 1
        self.num_active += 1
        try:
            return await self._answer(request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.num_cancelled += 1
            raise
        finally:
            self.num_active -= 1
            self.ended.add(request.headers.get("X-Request-Id", ""))

    async def metadata(self, request: web.Request) -> web.Response:
        """Of the Open Inference Protocol."""
        if request.match_info.get("version", "1") != "1":
            return web.json_response({"error": "no such version"}, status=404)
        tensors = {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}],
        }
        told = {"name": request.match_info["name"], "versions": ["1"], "platform": "stand-in", **tensors}
        return web.json_response(told)

    async def infer(self, request: web.Request) -> web.Response:
        """Echo the body, and the header that says where its JSON ends; the inputs `wait` never get an answer."""
        self.num_asked += 1
        body = await request.read()
        if b"wait" in body:
            await asyncio.Event().wait()
        told = {"Inference-Header-Content-Length", "X-LLMC-Key"} & set(request.headers)
        headers = {name: request.headers[name] for name in told if name != "X-LLMC-Key"}
        kind = "application/octet-stream" if headers else "application/json"
        return web.Response(body=body, content_type=kind, headers=headers)

    async def stored(self, request: web.Request) -> web.Response:
        """A response that was given before: its id, and for whom it is kept."""
        told = {"id": request.match_info["response_id"], "owner": request.headers.get("X-LLMC-Key", "")}
        return web.json_response(told)

    async def input_items(self, request: web.Request) -> web.Response:
        """What is asked of the list, and for whom that is."""
        return web.json_response({"owner": request.headers.get("X-LLMC-Key", ""), **request.query})

    async def usage(self, request: web.Request) -> web.Response:
        """What a request that has ended has cost, for the gateway: always the same."""
        if request.match_info["request_id"] not in self.ended:
            return web.json_response({}, status=404)
        return web.json_response({"prompt_tokens": 3, "completion_tokens": 7})

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if os.path.exists(os.path.join(self.spec["model"], "failing")):
            error = {"message": "it fails", "type": "server_error", "param": None, "code": None}
            return web.json_response({"error": error}, status=500)
        if prompt == "die":
            os._exit(9)
        if prompt == "wait":
            await asyncio.Event().wait()
        if prompt == "busy":
            error = {"message": "busy", "type": "service_unavailable_error", "param": None, "code": None}
            return web.json_response({"error": error}, status=503, headers={"Retry-After": "7"})
        if prompt == "headers":
            prompt = json.dumps({name.lower(): value for name, value in request.headers.items()})
            return web.json_response({"choices": [{"index": 0, "text": prompt}], "usage": _USAGE})
        if body.get("stream"):
            return await self._stream(request, prompt)
        if prompt.startswith("slow "):
            await asyncio.sleep(float(prompt.split()[1]) / 1000)
        choice = {"index": 0, "text": f"{prompt}!", "message": {"role": "assistant", "content": f"{prompt}!"}}
        return web.json_response({"id": "cmpl-1", "choices": [choice], "usage": _USAGE, "model": body["model"]})

    async def _stream(self, request: web.Request, prompt: str) -> web.StreamResponse:
        wanted = request.headers.get("X-LLMC-Stream-Usage") == "comment"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if prompt.startswith("flood"):
            await self._flood(response, int(prompt.split()[1]))
        async for piece in _pieces(prompt):
            event = {"choices": [{"index": 0, "delta": {"content": piece}, "text": piece}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if not prompt.startswith("end after"):
            await response.write(b"data: [DONE]\n\n")
            told = b': usage {"prompt_tokens":3,"completion_tokens":5}\n\n' if wanted else b""
            await response.write_eof(told)
        return response

    async def _flood(self, response: web.StreamResponse, number: int) -> None:
        event = b"data: " + json.dumps({"choices": [{"index": 0, "text": "x" * 4000}]}).encode() + b"\n\n"
        for _ in range(number):
            await response.write(event)


async def _pieces(prompt: str) -> AsyncIterator[str]:
    words = prompt.split()
    if words[0] == "stamp":
        for _ in range(int(words[1])):
            yield str(time.monotonic())
            await asyncio.sleep(float(words[2]) / 1000)
        return
    number = int(words[1]) if words[0] == "flood" else 0
    while words[0] in ("endless", "die") or number < int(words[-1]):
        if words[0] == "die" and number == int(words[2]):
            os._exit(9)
        yield f"{number} "
        number += 1
        await asyncio.sleep(0.01)


async def main() -> None:
    """Serve until standard input ends."""
    stand_in = StandIn(json.loads(sys.stdin.readline()))
    application = web.Application(middlewares=[stand_in.check], client_max_size=32 << 20)
    application.router.add_get("/readyz", stand_in.readyz)
    application.router.add_get("/stats", stand_in.stats)
    application.router.add_get("/usage/{request_id}", stand_in.usage)
    application.router.add_post("/reload", stand_in.reload)
    application.router.add_post("/adapters", stand_in.set_adapter)
    application.router.add_post("/v1/completions", stand_in.complete)
    application.router.add_post("/v1/chat/completions", stand_in.complete)
    application.router.add_post("/v1/embeddings", stand_in.infer)
    application.router.add_get("/v1/responses/{response_id}", stand_in.stored)
    application.router.add_get("/v1/responses/{response_id}/input_items", stand_in.input_items)
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        application.router.add_get(path, stand_in.metadata)
        application.router.add_post(f"{path}/infer", stand_in.infer)
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, stand_in.spec["socket"]).start()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
