"""What a client is told that asks for a path which is not there: whose it is, and what there is instead."""

from __future__ import annotations

import re
from urllib.parse import unquote

_ASK = "POST {root}/v1/chat/completions, {root}/v1/completions, {root}/v1/responses or {root}/v1/embeddings"
# What comes after the version, and what may be said of it.
_OTHERS = (
    (r"messages(/.*)?|complete", "that is Anthropic's API, and this is OpenAI's"),
    (r"(images|audio|videos|realtime)(/.*)?", "models here read and write text"),
    (r"moderations|rerank|score|classify", "no route here is for that; models that classify are asked by {root}/v2"),
    (r"(assistants|threads|vector_stores|conversations|containers|evals|uploads)(/.*)?", "it is not kept here"),
    (r"fine_tuning(/.*)?", "models are trained in a notebook here, by %%distribute"),
    (r"responses/.+", "a response is read by GET /v1/responses/ID, also ID/input_items, and removed by DELETE"),
    (r"engines(/.*)?|edits", "that is an old form of OpenAI's API"),
    (r"api/(chat|generate|tags|show|embed)", "that is Ollama's API, and this is OpenAI's"),
)  # fmt: skip


def model_in(path: str, base_url: str = "/") -> str | None:
    """The name of a model that a path below `models` asks for; None for another path."""
    found = re.fullmatch(rf"{re.escape(base_url.rstrip('/'))}/llmcloud/+v1/+models/+(.+?)/*", path)
    return unquote(found[1]) if found else None


def unknown_path(method: str, path: str, base_url: str = "/") -> str:
    """The message; `base_url` is that of the Jupyter server."""
    root = f"{base_url.rstrip('/')}/llmcloud"
    said = f"{method} {path[:256]} does not exist here"
    rest = path.removeprefix(root).strip("/")
    if (again := re.fullmatch(r"v1/+v1/+(.+)", rest)) is not None:
        return f"{said}: it has /v1 twice. Ask {root}/v1/{again[1]}."
    if not rest.startswith("v1"):
        return f"{said}: /v1 is missing. Ask {root}/v1/{rest}; the base URL of a client is {root}/v1."
    rest = rest.removeprefix("v1").strip("/")
    known = next((why for pattern, why in _OTHERS if re.fullmatch(pattern, rest)), "")
    why = f": {known.format(root=root)}" if known else ""
    return f"{said}{why}. There is {_ASK.format(root=root)}, and GET {root}/v1/models."
