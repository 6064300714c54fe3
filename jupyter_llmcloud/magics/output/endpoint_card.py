"""The live card of an endpoint: the static one, and a button that copies a key.

The key travels in one custom message, on a click, and lives in the clipboard alone: it is no trait, so that neither the
saved notebook nor its widget state can hold it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from jupyter_llmcloud.errors import LLMCloudError

if TYPE_CHECKING:
    from jupyter_llmcloud.magics.output.endpoint import Endpoint


class EndpointCard(anywidget.AnyWidget):
    """What `endpoint_card.js` shows."""

    _esm = Path(__file__).parent / "endpoint_card.js"
    name = traitlets.Unicode().tag(sync=True)
    url = traitlets.Unicode().tag(sync=True)
    snippets = traitlets.Dict().tag(sync=True)


def make_card(endpoint: Endpoint) -> EndpointCard:
    """A card whose button answers with the endpoint's key."""
    card = EndpointCard(name=endpoint.name, url=endpoint.base_url, snippets=endpoint.snippets())

    def on_message(_card: Any, content: dict[str, Any], _buffers: Any) -> None:
        if content.get("kind") == "key":
            card.send(_key_message(endpoint))

    card.on_msg(on_message)
    return card


def _key_message(endpoint: Endpoint) -> dict[str, str]:
    try:
        return {"kind": "key", "key": endpoint.api_key}
    except LLMCloudError as error:
        return {"kind": "error", "message": str(error)}
