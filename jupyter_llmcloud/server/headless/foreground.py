"""`jupyter llmcloud serve`: one endpoint in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys

from jupyter_llmcloud import config
from jupyter_llmcloud.core.spec import EndpointSpec
from jupyter_llmcloud.errors import LLMCloudError, ModelError
from jupyter_llmcloud.server.api.keys import mint
from jupyter_llmcloud.server.cluster_access import Identity
from jupyter_llmcloud.server.headless.app import (
    HeadlessServerApp,
    announce,
    base_url,
    context_of,
    make_app,
    remove_folder,
)

WAIT_S = 3600.0


def serve(target: str, spec: EndpointSpec, port: int) -> int:
    """Serve `target` and print its URL and a key, once; returns the exit status."""
    token = secrets.token_urlsafe(32)
    app = make_app(Identity(headless=True, owner_pid=os.getpid()), token, port, log_level="ERROR")
    path = config.runtime_dir() / f"headless-{os.getpid()}.json"
    status: list[int] = []

    async def begin() -> None:
        announce(path, app, token)
        try:
            await _begin(app, target, spec)
        except LLMCloudError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status.append(1)
            app.stop()

    app.io_loop.add_callback(begin)
    try:
        app.start()
    finally:
        path.unlink(missing_ok=True)
        remove_folder(app)
    return status[0] if status else 0


async def _begin(app: HeadlessServerApp, target: str, spec: EndpointSpec) -> None:
    context = context_of(app)
    folder = os.path.abspath(os.path.expanduser(target))
    await context.started()
    chosen = folder if os.path.isdir(folder) else target
    base = spec.base_model and os.path.abspath(os.path.expanduser(spec.base_model))
    endpoint = await context.endpoints.create(
        chosen, spec.name, spec.replicas, spec.dtype, base_model=base, max_model_len=spec.max_model_len,
        max_concurrent=spec.max_concurrent, threads=spec.threads, engine=spec.engine,
    )  # fmt: skip
    print(f"Starting {endpoint.name} ...", file=sys.stderr, flush=True)
    await asyncio.wait_for(endpoint.wait("starting", WAIT_S), WAIT_S + 1)
    if endpoint.stored.state != "ready":
        raise ModelError(f"endpoint {endpoint.name!r} has {endpoint.stored.state}: {endpoint.stored.reason}")
    key, _ = mint(context.state, [f"infer:{endpoint.name}", "models:read"], "terminal", label="jupyter llmcloud serve")
    print(f"base_url  {base_url(app)}llmcloud/v1")
    print(f"api_key   {key.text}")
    print(f"model     {endpoint.name}", flush=True)
    print("Ctrl-C ends it and all that it started.", file=sys.stderr, flush=True)
