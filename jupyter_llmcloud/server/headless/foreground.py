"""`jupyter llmcloud serve`: one endpoint in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import shlex
import sys

from jupyter_llmcloud import config
from jupyter_llmcloud.core.serving.models.model_kind import EMBEDDER, GENERATOR, sample_inputs
from jupyter_llmcloud.core.spec import EndpointSpec
from jupyter_llmcloud.errors import LLMCloudError, ModelError
from jupyter_llmcloud.server.api.keys import mint
from jupyter_llmcloud.server.cluster_access import Identity
from jupyter_llmcloud.server.headless.app import (
    HeadlessServerApp,
    announce,
    context_of,
    make_app,
    public_url,
    remove_folder,
)
from jupyter_llmcloud.server.headless.listener import LOOPBACK, Listener

WAIT_S = 3600.0
PLAIN_TEXT = (
    "Keys and prompts cross the network unencrypted when others ask {ip}: give --certfile and --keyfile, or let only "
    "a proxy with TLS reach it."
)
GENERATES = """
{curl} {url}/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" -d '{{"model": "{model}", "prompt": "The", "max_tokens": 16}}'

{trust}from openai import {names}
client = OpenAI(base_url="{url}", api_key="{key}"{openai_trusts})
print(client.completions.create(model="{model}", prompt="The", max_tokens=16).choices[0].text)
"""
EMBEDS = """
{curl} {url}/embeddings -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" -d '{{"model": "{model}", "input": "Hello"}}'

{trust}from openai import {names}
client = OpenAI(base_url="{url}", api_key="{key}"{openai_trusts})
print(client.embeddings.create(model="{model}", input="Hello").data[0].embedding)
"""
PREDICTS = """
{curl} {v2}/models/{model}/infer -H "Authorization: Bearer {key}" -d '{{"inputs": {inputs}}}'

{trust}import httpx
headers = {{"Authorization": "Bearer {key}"}}
print(httpx.post("{v2}/models/{model}/infer", headers=headers, json={{"inputs": {inputs}}}{httpx_trusts}).json())
"""


# Beside the authorities that Python knows: a certificate that somebody has made for themselves is of none of them.
TRUST = """import ssl
trusted = ssl.create_default_context()
trusted.load_verify_locations({certfile!r})
"""


def serve(target: str, spec: EndpointSpec, listener: Listener = LOOPBACK) -> int:
    """Serve `target` and print its URL and a key, once; returns the exit status."""
    token = secrets.token_urlsafe(32)
    app = make_app(Identity(headless=True, owner_pid=os.getpid()), token, listener, log_level="ERROR")
    if not listener.is_local and not listener.certfile:
        print(PLAIN_TEXT.format(ip=listener.ip), file=sys.stderr, flush=True)
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


def examples(kind: str, url: str, key: str, model: str, certfile: str = "", inputs: str = "") -> str:
    """What can be pasted into a shell and into Python to ask a model of this kind.

    Args:
        certfile: the certificate of the server, if it has one; "": it speaks no TLS.
        inputs: JSON that the model can be asked with, where it has told some.
    """
    template = GENERATES if kind == GENERATOR else EMBEDS if kind == EMBEDDER else PREDICTS
    certfile = os.path.abspath(certfile) if certfile else ""  # it is pasted in another folder than this one
    return template.format(
        url=url, key=key, model=model, v2=f"{url.removesuffix('/v1')}/v2", inputs=sample_inputs(kind, inputs),
        curl=f"curl --cacert {shlex.quote(certfile)}" if certfile else "curl",
        trust=TRUST.format(certfile=certfile) if certfile else "",
        names="DefaultHttpxClient, OpenAI" if certfile else "OpenAI",
        openai_trusts=", http_client=DefaultHttpxClient(verify=trusted)" if certfile else "",
        httpx_trusts=", verify=trusted" if certfile else "",
    )  # fmt: skip


async def _begin(app: HeadlessServerApp, target: str, spec: EndpointSpec) -> None:
    context = context_of(app)
    folder = os.path.abspath(os.path.expanduser(target))
    await context.started()
    chosen = folder if os.path.isdir(folder) else target
    base = spec.base_model and os.path.abspath(os.path.expanduser(spec.base_model))
    endpoint = await context.endpoints.create(chosen, dataclasses.replace(spec, base_model=base))
    print(f"Starting {endpoint.name} ...", file=sys.stderr, flush=True)
    await asyncio.wait_for(endpoint.wait("starting", WAIT_S), WAIT_S + 1)
    if endpoint.stored.state != "ready":
        raise ModelError(f"endpoint {endpoint.name!r} has {endpoint.stored.state}: {endpoint.stored.reason}")
    key, _ = mint(context.state, [f"infer:{endpoint.name}", "models:read"], "terminal", label="jupyter llmcloud serve")
    url = f"{public_url(app)}llmcloud/v1"
    print(f"base_url  {url}")
    print(f"api_key   {key.text}")
    print(f"model     {endpoint.name}")
    print(examples(endpoint.kind, url, key.text, endpoint.name, app.listener.certfile, endpoint.inputs), flush=True)
    print("Ctrl-C ends it and all that it started.", file=sys.stderr, flush=True)
